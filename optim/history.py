"""The batch's history: the samples and tokens of a run's past steps, as the points where they changed (rule R5)."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..config.duration import Unit


class ChangePoint(NamedTuple):
    """A step from which on the batch was another: the run's counters at its beginning, and the new batch."""

    step: int
    samples: int
    tokens: int
    batch: int

    def at(self, unit: Unit) -> int:
        """Return the counter of a unit."""
        return {Unit.STEPS: self.step, Unit.SAMPLES: self.samples, Unit.TOKENS: self.tokens}[unit]


@dataclass(frozen=True)
class BatchHistory:
    """Change points in the order of steps, the first at step 0. Between two of them every step had the same batch."""

    points: tuple[ChangePoint, ...] = ()

    def extended(self, point: ChangePoint, seq_len: int) -> BatchHistory:
        """Return the history with a step that begins at `point`, of its batch and `seq_len` tokens a sample."""
        if self.points:
            last = self.points[-1]
            same_length = point.tokens - last.tokens == (point.samples - last.samples) * seq_len
            if point.batch == last.batch and same_length:
                return self
        return BatchHistory((*self.points, point))

    def convert(self, value: float, here: Unit, there: Unit, now: ChangePoint, seq_len: int) -> float:
        """Convert a point of the run from unit `here` to unit `there`.

        Up to `now` the history says what steps were worth. Beyond, every step has `now.batch` samples of `seq_len` tokens.
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
        """Return the points as JSON values."""
        return [list(point) for point in self.points]

    @classmethod
    def from_json(cls, points: Sequence[Sequence[int]]) -> BatchHistory:
        """Restore what `as_json` returned."""
        return cls(tuple(ChangePoint(*point) for point in points))
