"""Watch a run: heartbeats of its ranks, who is silent or slow, and what has happened to it."""
