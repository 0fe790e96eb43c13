"""Guard a run's steps: judge each on the device, skip bad ones, find out what was wrong with them, and go back if need be."""
