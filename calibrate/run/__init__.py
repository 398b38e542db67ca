"""Measure one GPU: which points, in which order, timed how, written where."""
