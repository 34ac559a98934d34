"""Plots of runs, activation maps, and the figures of docs/chapters.md."""
