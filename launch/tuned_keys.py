"""The keys that `meshloom tune` varies: those that change speed and memory alone."""

BUDGET = "trainer.activation_budget"
KEYS = ("parallel.zero", "batch.micro", "trainer.activation", BUDGET)
