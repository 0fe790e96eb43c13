"""Floor 0: composition of configs, their problems, and small values that every floor uses."""
