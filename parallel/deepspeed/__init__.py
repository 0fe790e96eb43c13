"""The DeepSpeed engine: its config, set-up, state by parameter name, and memory."""
