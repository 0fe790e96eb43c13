"""The batch's history: what a run's past steps were worth in samples and tokens, as the points where that changed (rule R5)."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..config.duration import Unit


class ChangePoint(NamedTuple):
    """The beginning of a step from which on steps had another batch: the run's counters then, and the new batch."""

    step: int
    samples: int
    tokens: int
    batch: int

    def at(self, unit: Unit) -> int:
        """The counter of a unit."""
        return {Unit.STEPS: self.step, Unit.SAMPLES: self.samples, Unit.TOKENS: self.tokens}[unit]


@dataclass(frozen=True)
class BatchHistory:
    """Change points in the order of steps, the first at step 0. Between two of them every step had the same batch."""

    points: tuple[ChangePoint, ...] = ()

    def extended(self, point: ChangePoint, seq_len: int) -> BatchHistory:
        """The history once a step of this batch, and of samples this long, begins at these counters."""
        if self.points:
            last = self.points[-1]
            same_length = point.tokens - last.tokens == (point.samples - last.samples) * seq_len
            if point.batch == last.batch and same_length:
                return self
        return BatchHistory((*self.points, point))

    def convert(self, value: float, here: Unit, there: Unit, now: ChangePoint, seq_len: int) -> float:
        """A point of the run counted in `here`, counted in `there`.

        Up to `now` it is what it was. Beyond, every step has `now.batch` samples of `seq_len` tokens.
        """
        knots = [point for point in self.points if point.step < now.step] + [now]
        index = bisect.bisect_right(knots, value, key=lambda knot: knot.at(here)) - 1
        start = knots[max(index, 0)]
        if index + 1 < len(knots):
            stop = knots[index + 1]
            if stop.at(here) > start.at(here):
                rate = (stop.at(there) - start.at(there)) / (stop.at(here) - start.at(here))
                return start.at(there) + (value - start.at(here)) * rate
        worth = {Unit.STEPS: 1, Unit.SAMPLES: now.batch, Unit.TOKENS: now.batch * seq_len}
        return now.at(there) + (value - now.at(here)) / worth[here] * worth[there]

    def as_json(self) -> list[list[int]]:
        """As plain JSON."""
        return [list(point) for point in self.points]

    @classmethod
    def from_json(cls, points: Sequence[Sequence[int]]) -> BatchHistory:
        """Take back what `as_json` gave."""
        return cls(tuple(ChangePoint(*point) for point in points))
