"""Scaling laws: published ones, and fits to your own runs."""
