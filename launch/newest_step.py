"""Leave the newest saved step of a run to the script of a SLURM job, which queues itself again only if it has moved."""

from __future__ import annotations

import os
from pathlib import Path

from ..checkpoint.folder import read_newest
from ..trainer.derived import checkpoint_folder
from ..trainer.schema import RunConfig

NEWEST_STEP = "MESHLOOM_NEWEST_STEP"
"""Environment variable with the file for it."""


def write_newest_step(config: RunConfig) -> None:
    """Write the newest saved step, 0 if nothing is saved, where that is asked for. Write nothing if it can't be told."""
    file = os.environ.get(NEWEST_STEP)
    if not file:
        return
    try:
        newest = read_newest(checkpoint_folder(config))
        beside = Path(f"{file}.{os.getpid()}.new")
        beside.write_text(f"{0 if newest is None else newest.step}\n")
        beside.replace(file)
    except Exception:  # a store that can't be reached, a full disk: the script then counts how often it has queued itself
        return
