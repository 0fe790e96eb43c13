"""Predict what a run costs: memory, time, the pipeline's timeline, the machine, tables and drawings."""
