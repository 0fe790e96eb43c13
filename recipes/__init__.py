"""Hydra recipes: config groups and complete runs."""
