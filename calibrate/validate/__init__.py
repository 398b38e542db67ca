"""Predictions against measurements of others."""
