"""Floor 6: how a run starts, and what a person types."""
