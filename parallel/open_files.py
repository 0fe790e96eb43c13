"""The limit of open files: a process of a large run has a connection to every other one, in several process groups.

Imports no torch.
"""

from __future__ import annotations

import logging
import resource

log = logging.getLogger(__name__)

FILES_OF_ITS_OWN = 512  # libraries, data, logs, a checkpoint
GROUPS = 4
"""Groups of all processes, or as many connections in smaller ones: the run's, its axes', one while a checkpoint is restored.
Levels of the gradient exchange (`exchange_levels.py`) connect a rank to far fewer, to 53 of 4,096."""


def files_needed(world_size: int) -> int:
    """Return how many files and connections one process of a run may have open."""
    return FILES_OF_ITS_OWN + GROUPS * world_size


def raise_file_limit(world_size: int, *, tell: bool) -> None:
    """Raise this process's soft limit of open files to what a run of so many processes needs, as far as the hard one allows.

    tell: whether to warn where that is not enough
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = files_needed(world_size)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    reachable = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    if reachable > soft:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (reachable, hard))
        except (OSError, ValueError):  # the kernel has a limit of its own
            reachable = soft
    if reachable < needed and tell:
        log.warning(
            "a process of this run may need %d open files, and %d are allowed: raise the hard limit (ulimit -Hn, LimitNOFILE)",
            needed,
            reachable,
        )
