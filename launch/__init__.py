"""Floor 7: how a run starts, and what a person types."""

import os

# Set before torch loads its thread pool. On a CPU machine shared with other work, OpenMP threads that spin while they wait
# for one another made a step of the quickstart recipe 7 times slower (2 cores, load 15: 35 s against 5 s).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
