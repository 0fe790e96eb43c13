"""How the learning rate moves during a run."""
