"""End a process that takes too long, with all that it has started: what the benchmarks that run others share."""

from __future__ import annotations

import contextlib
import subprocess
from typing import Any

import psutil

GRACE = 10  # seconds in which a process that is stopped may end by itself


def end(process: subprocess.Popen[Any]) -> None:
    """End a process with its descendants: torchrun's workers are in sessions of their own, and may outlive it."""
    left: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
        left = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE)
    process.kill()
    for each in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()  # not one that has taken over its number: psutil compares the times of their starts
    process.wait()
