"""Floor 0: how a config is composed, what is wrong with it, and small values that every floor uses."""
