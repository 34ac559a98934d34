"""Figures: loss curves, attention maps, and the figures of docs/chapters.md."""
