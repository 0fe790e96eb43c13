"""Faults in whole runs: draw schedules of them, inject them, run what they hit, and judge what the run noticed."""
