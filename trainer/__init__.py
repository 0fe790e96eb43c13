"""Floor 6: the training step, the loop around it, and the hooks that watch it."""
