"""Pipeline parallelism: stages, schedules and the passing of micro-batches."""
