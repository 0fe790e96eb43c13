"""What a run will cost: memory, time, the pipeline's timeline, the machine, tables and drawings."""
