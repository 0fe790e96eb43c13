"""Optimizers, and what they may ask of an engine."""
