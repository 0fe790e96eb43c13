"""How many samples a step takes, and what is measured to decide it."""
