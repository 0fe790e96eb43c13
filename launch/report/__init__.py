"""The report of runs: one page, and its pictures."""
