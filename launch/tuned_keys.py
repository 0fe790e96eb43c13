"""The keys that `meshloom tune` varies: those that change speed and memory alone."""

BUDGET = "trainer.activation_budget"
KEYS = ("parallel.zero", "batch.micro", "trainer.activation", BUDGET)
HYBRID_KEYS = tuple("parallel.hdp_tokens" if key == "batch.micro" else key for key in KEYS)
"""Those of a run with hybrid data parallelism, whose micro-batches are rows of so many tokens at most."""
