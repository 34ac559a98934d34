"""Benchmarks of training and serving against other libraries; each prints a table and writes JSON."""
