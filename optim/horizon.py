"""Horizon: the length of a run, and conversion between its steps, samples and tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..config.duration import Duration, Unit
from .history import ChangePoint
from .progress import BEGINNING, Progress


@dataclass(frozen=True)
class Horizon:
    """The length of a run, and the exchange rates between the units of a `Duration`.

    Of a schedule that begins in the middle of a run (in a stage), it is the horizon of that schedule: points are counted from
    `origin`, and the length is that of the schedule's part of the run.

    length   of the run, in steps, tokens or samples (`trainer.steps` or `trainer.tokens`)
    seq_len  tokens of a sample
    batch    samples of every step; None where a controller changes them
    begun    the progress that the run is started with. Only checks before the start read it
    origin   the run's counters at the point that everything is counted from
    """

    length: Duration
    seq_len: int
    batch: int | None = None
    begun: Progress = BEGINNING
    origin: ChangePoint = BEGINNING.point

    def __post_init__(self) -> None:
        assert self.length.unit is not Unit.FRACTION, "the length of a run is not a fraction of itself"

    @property
    def unit(self) -> Unit:
        """The unit of the run's length."""
        return self.length.unit

    @property
    def total(self) -> float:
        """The length of the run in its own unit."""
        return self.length.value

    def amount(self, duration: Duration, unit: Unit) -> float:
        """Convert a duration to `unit`, at the batch that every step of the run has.

        Raises ValueError for steps to tokens or samples, or back, while the batch size changes: there is no fixed answer.
        """
        if duration.unit is Unit.FRACTION:
            return duration.value * self.amount(self.length, unit)
        if duration.unit is unit or duration.value == 0:
            return duration.value
        samples = {Unit.SAMPLES: 1, Unit.TOKENS: self.seq_len, Unit.STEPS: None}
        here, there = samples[duration.unit], samples[unit]
        if here is not None and there is not None:
            return duration.value / here * there
        if self.batch is None:
            raise ValueError(f"{duration} has no fixed number of {unit.value} while the batch size changes")
        if there is None:
            assert here is not None
            return duration.value / here / self.batch
        return duration.value * self.batch * there

    def after_start(self, duration: Duration, unit: Unit, progress: Progress) -> float:
        """Return the point of the run, counted in `unit`, that is `duration` after its start.

        Up to `progress` it follows the batch's history, and beyond it today's batch. Returns inf for a point beyond
        `progress` that depends on the batch, while a controller changes that.
        """
        if duration.unit is Unit.FRACTION:
            return self.convert(duration.value * self.total, self.unit, unit, progress)
        return self.convert(duration.value, duration.unit, unit, progress)

    def before_end(self, duration: Duration, progress: Progress) -> float:
        """Return the point, counted in the unit of the run's length, that is `duration` before its end; as `after_start`."""
        if duration.unit is Unit.FRACTION:
            return self.total - duration.value * self.total
        end = self.convert(self.total, self.unit, duration.unit, progress)
        return self.convert(end - duration.value, duration.unit, self.unit, progress)

    def convert(self, value: float, here: Unit, there: Unit, progress: Progress) -> float:
        """Convert a point of the run from unit `here` to unit `there`; as `after_start`."""
        if here is there:
            return value
        ahead = not progress.history.points or value > self.position(progress, here)
        if ahead and self.batch is None and Unit.STEPS in (here, there):
            return math.inf
        if progress.history.points:
            value += self.origin.at(here)
            return progress.history.convert(value, here, there, progress.point, self.seq_len) - self.origin.at(there)
        return self.amount(Duration(value, here), there)

    def position(self, progress: Progress, unit: Unit) -> float:
        """Return how far the run has come from the origin, at the beginning of the step, in `unit`."""
        return progress.point.at(unit) - self.origin.at(unit)

    def stride(self, progress: Progress, unit: Unit) -> float:
        """Return the length of the step about to be taken, in `unit`."""
        return {Unit.STEPS: 1, Unit.TOKENS: progress.batch * self.seq_len, Unit.SAMPLES: progress.batch}[unit]
