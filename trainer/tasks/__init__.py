"""Benchmark tasks of lm-eval, evaluated with our models: on a checkpoint, or inside a run."""
