"""The in-memory tier: keepers, parity over groups of ranks, recovery."""
