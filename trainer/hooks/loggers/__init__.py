"""Loggers: hooks on rank 0 that write rows of metrics."""
