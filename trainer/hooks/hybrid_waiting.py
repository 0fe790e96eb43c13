"""Times that ranks waited under hybrid data parallelism, beside what the plan of the step said."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...parallel.hybrid.share import HybridAssigner
from ..loop import Loop
from .base import Hook

COMPILING = 2
"""First steps of a process, whose own work is not yet that of a step."""


class MeasureWaiting(Hook):
    """Adds to the metrics which part of the ranks' time they waited, until the last one had run its passes.

    hybrid/measured_wait  for their rings, and at the end of the step: 1 - mean of the own work / largest time of passes
    hybrid/ring_wait      the first part of it alone
    Both are of the step before that of the row. It exists on rank 0.
    """

    alone = True

    def __init__(self) -> None:
        self._seen = 0

    @staticmethod
    def can_measure(dealer: object) -> bool:
        """Return whether ranks meet at the end of a step only. Where they do in every row, all show the slowest one's time."""
        return isinstance(dealer, HybridAssigner) and not dealer.lockstep and dealer.stages == 1

    def on_metrics(self, loop: Loop, row: dict[str, Any]) -> None:
        """Add the waiting to the row."""
        self._seen += 1
        own, ring_wait = (np.array([getattr(each, name) for each in loop.work]) for name in ("own", "ring_wait"))
        passes = own + ring_wait
        if self._seen > COMPILING and (slowest := float(passes.max())) > 0:
            row["hybrid/measured_wait"] = 1 - float(own.mean()) / slowest
            row["hybrid/ring_wait"] = float(ring_wait.mean()) / slowest
