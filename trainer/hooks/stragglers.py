"""Stragglers: ranks whose own work takes longer than that of the others, which then wait for them in every step."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from ...parallel.compute_time import StepWork
from ...parallel.layout import Layout
from ..loop import Loop
from ..watch.incidents import Incident, IncidentLog
from ..watch.rank import find_rank
from .base import Hook

log = logging.getLogger(__name__)

WINDOW = 20
"""Steps over which a rank is judged: one slow file or garbage collection is not a slow rank."""
STEADY = 0.75
"""Share of these steps in which a rank has to be slow."""
SLOWER = 1.2
"""Times the usual own work, from which a rank is slow ..."""
SLOWER_LAYERS = 1.5
"""... or times the usual forward passes of its layers, where only these are compared: a part of a step varies more ..."""
SHARE = 0.05
"""... if the others also wait for it this share of a step."""


class NameStragglers(Hook):
    """Adds each step's slowest rank to the metrics, and names a rank that stays slow, once. It exists on rank 0.

    Ranks are compared with those of the same pipeline stage: stages may have unequal work by design. Where each stage has one
    rank, the forward passes of layers of the same kind are compared. Under expert parallelism a rank may work longer by the
    share by which more tokens have chosen its experts.
    """

    alone = True

    def __init__(self) -> None:
        self._recent: list[list[StepWork]] = []
        self._seconds: list[float] = []
        self._named: set[int] = set()
        self._seen = 0

    def on_metrics(self, loop: Loop, row: dict[str, Any]) -> None:
        """Add the slowest rank and the others' waiting to the row; once a window, look for ranks that stay slow."""
        own = [each.own for each in loop.work]
        self._seen += 1
        if len(own) < 2 or self._seen < 3:  # the first steps compile
            return
        slowest = int(np.argmax(own))
        row["own_seconds"] = _usual(own)
        row["own_seconds_slowest"] = own[slowest]
        row["slowest_rank"] = slowest
        self._recent.append(loop.work)
        self._seconds.append(row["step_seconds"])
        if len(self._recent) == WINDOW:
            self._judge(loop)
            self._recent.clear()
            self._seconds.clear()

    def _judge(self, loop: Loop) -> None:
        layout, steps = loop.island.layout, self._recent
        own = np.array([[each.own for each in step] for step in steps])
        alone = layout.pp == own.shape[1]
        compared = np.array([[each.in_layers for each in step] for step in steps]) if alone else own
        usual = np.array([_usual_in_layers(step) if alone else _usual_of_stages(step, layout) for step in steps])
        slower, seconds = SLOWER_LAYERS if alone else SLOWER, float(np.median(self._seconds))

        def excess(rank: int, load: float) -> float:
            """Return the seconds by which a rank stays slow, for so many times the usual work; 0: it is not slow."""
            expected = load * usual[:, rank]
            more = float(np.median(compared[:, rank] - expected))
            return more if (compared[:, rank] > slower * expected).mean() >= STEADY and more > SHARE * seconds else 0.0

        for rank in {*range(own.shape[1])} - self._named:
            if excess(rank, 1.0) and (more := excess(rank, _load(loop, rank))):
                self._named.add(rank)
                typical = float(np.median(own[:, rank]))
                self._name(loop, rank, typical, typical - more, seconds)

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


def _usual_of_stages(work: list[StepWork], layout: Layout) -> list[float]:
    """Return for each rank what own work is usual in its stage."""
    stages: dict[int, list[float]] = {}
    places = [layout.coordinates(rank)["pp"] for rank in range(len(work))]
    for place, each in zip(places, work, strict=True):
        stages.setdefault(place, []).append(each.own)
    return [_usual(stages[place]) for place in places]


def _usual_in_layers(work: list[StepWork]) -> list[float]:
    """Return for each rank how long the forward passes of its layers take where a layer takes as long as usual."""
    usual = _usual([each.in_layers / each.layers for each in work if each.layers] or [0.0])
    return [usual * each.layers for each in work]


def _load(loop: Loop, rank: int) -> float:
    """Return how many times as many tokens as usual have chosen the experts of a rank, in the newest step; 1 at least.

    It waits for the device, and is asked only of a rank that is about to be named. Of a pipeline's stage the layer counts that
    has most of them.
    """
    layout = loop.island.layout
    counts_LE = loop.engine.assignments() if layout.ep > 1 else None
    if counts_LE is None:
        return 1.0
    rows_LR = counts_LE.unflatten(1, (layout.ep, -1)).sum(-1).cpu()
    rows_LR = rows_LR if layout.pp > 1 else rows_LR.sum(0, keepdim=True)
    place = layout.expert_coordinates(rank)["ep"]
    return max(1.0, *(row[place] / max(1.0, _usual(row)) for row in rows_LR.tolist()))


def _usual(seconds: list[float]) -> float:
    """Return the median; of an even number the lower one, so that of two ranks the faster is usual."""
    return float(np.sort(seconds)[(len(seconds) - 1) // 2])
