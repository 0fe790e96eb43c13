"""Hybrid data parallelism: how the documents of a global batch are dealt to ranks, long ones over several."""
