"""Floor 3: who holds what. Layouts, engines, and the parallel forms of what the model does."""
