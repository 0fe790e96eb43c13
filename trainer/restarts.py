"""Tell a run that a scheduler or torchrun has started again, and that has begun before: it goes on by itself.

A run's folder states the job and the launch that began it. So a job that is put back into the queue before it has taken the
folder over begins as its command line says, and not with the run that lay there before.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ..checkpoint.folder import OWNER

STARTS = {"job": ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"), "launch": ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")}
"""Each statement → the variables with its value, and with the number of times that it has been started again."""


def start_marks() -> dict[str, str]:
    """Return the job and the launch of this process, as a run's folder states them."""
    return {name: os.environ[variable] for name, (variable, _) in STARTS.items() if variable in os.environ}


def is_restarted(output_dir: Path) -> bool:
    """Return whether this process was started again by the job or the launch that began the run in a folder."""
    again = [name for name, (_, count) in STARTS.items() if int(os.environ.get(count, "0")) > 0]
    if not again:
        return False
    try:
        stated: Any = json.loads((output_dir / OWNER).read_text())
    except (OSError, ValueError):
        return False
    return isinstance(stated, dict) and any(stated.get(name) == start_marks().get(name, "") for name in again)
