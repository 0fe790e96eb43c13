"""How long ranks waited under hybrid data parallelism, beside what the plan of the step said."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...parallel.hybrid.share import HybridAssigner
from ..loop import Loop
from .base import Hook

COMPILING = 2
"""First steps of a process, whose own work is not yet that of a step."""


class MeasureWaiting(Hook):
    """Adds `hybrid/measured_wait` to the metrics: the part of the ranks' time in which they waited for the slowest one.

    That is 1 - mean / largest of the ranks' own work, in the step before that of the row. What a rank waits within a ring
    counts as its work. It exists on rank 0.
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
        if self._seen > COMPILING and (slowest := max(loop.own_work)) > 0:
            row["hybrid/measured_wait"] = 1 - float(np.mean(loop.own_work)) / slowest
