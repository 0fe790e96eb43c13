"""Stages of a run: what a recipe writes, what each of them resolves to, and what a run keeps of those it has begun."""
