"""Plots of runs and of activation maps, and the panels of figures."""
