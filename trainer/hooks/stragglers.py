"""Stragglers: ranks whose own work takes longer than that of the others, which then wait for them in every step."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from ..loop import Loop
from ..watch.incidents import Incident, IncidentLog
from ..watch.rank import find_rank
from .base import Hook

log = logging.getLogger(__name__)

WINDOW = 20
"""Steps over whose median a rank is judged: one slow file or garbage collection is not a slow rank."""
SLOWER = 1.2
"""Times the usual own work, from which a rank is slow ..."""
SHARE = 0.05
"""... if the others also wait for it this share of a step."""


class NameStragglers(Hook):
    """Adds each step's slowest rank to the metrics, and names a rank that stays slow, once. It exists on rank 0.

    Ranks are compared with those of the same pipeline stage: stages may have unequal work by design.
    """

    alone = True

    def __init__(self) -> None:
        self._recent: list[list[float]] = []
        self._seconds: list[float] = []
        self._named: set[int] = set()
        self._seen = 0

    def on_metrics(self, loop: Loop, row: dict[str, Any]) -> None:
        """Add the slowest rank and the others' waiting to the row; once a window, look for ranks that stay slow."""
        own = loop.own_work
        self._seen += 1
        if len(own) < 2 or self._seen < 3:  # the first steps compile
            return
        slowest = int(np.argmax(own))
        row["own_seconds"] = _usual(own)
        row["own_seconds_slowest"] = own[slowest]
        row["slowest_rank"] = slowest
        self._recent.append(own)
        self._seconds.append(row["step_seconds"])
        if len(self._recent) == WINDOW:
            self._judge(loop)
            self._recent.clear()
            self._seconds.clear()

    def _judge(self, loop: Loop) -> None:
        typical = np.median(np.asarray(self._recent), axis=0)
        step = float(np.median(self._seconds))
        stages: dict[int, list[int]] = {}
        for rank in range(len(typical)):
            stages.setdefault(loop.island.layout.coordinates(rank)["pp"], []).append(rank)
        for ranks in stages.values():
            usual = _usual([float(typical[rank]) for rank in ranks])
            for rank in ranks:
                excess = float(typical[rank]) - usual
                if len(ranks) > 1 and typical[rank] > SLOWER * usual and excess > SHARE * step and rank not in self._named:
                    self._named.add(rank)
                    self._name(loop, rank, float(typical[rank]), usual, step)

    def _name(self, loop: Loop, rank: int, own: float, usual: float, step: float) -> None:
        host, pid = find_rank(loop.output_dir, rank)
        where = f" ({host}, pid {pid})" if host else ""
        message = (
            f"rank {rank}{where} is slow: its own work takes {own:.3g} s of each step of {step:.3g} s, and {usual:.3g} s is"
            " usual; the other ranks wait for it"
        )
        log.warning("%s", message)
        details = {"own_seconds": own, "usual_seconds": usual, "step_seconds": step}
        IncidentLog(loop.output_dir).write(
            Incident("straggler", message, loop.progress.step, rank, host=host, pid=pid, details=details)
        )


def _usual(seconds: list[float]) -> float:
    """Return the median; of an even number the lower one, so that of two ranks the faster is usual."""
    return float(np.sort(seconds)[(len(seconds) - 1) // 2])
