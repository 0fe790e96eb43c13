"""Learning-rate schedules: pure functions of how far the run has come (rule R5).

A schedule holds only its settings, so a resumed run, on any layout and at any batch size, has the learning rate that an
uninterrupted one has. Durations in another unit than the run's length are converted by the batches of past steps
(`Progress.history`), so a batch that changes on a resume does not move past points.

The warm-up is read at the *end* of the step about to be taken (the first of W warm-up steps has peak / W, not 0),
everything else at its beginning.
"""

from __future__ import annotations

import math

from ...config.duration import Duration, Unit
from ...config.problems import Problem
from ..horizon import Horizon
from ..progress import Progress
from .config import CosineConfig, LinearConfig, ScheduleConfig
from .decay import cosine, linear


class Schedule:
    """Base of the schedules: constant after the warm-up.

    config   settings without problems of their own
    peak     the learning rate after the warm-up
    horizon  the length of the run

    A subclass overrides `base_lr`. Settings that don't fit the run's length are collected, not raised: see `problems`.
    """

    def __init__(self, config: ScheduleConfig, peak: float, horizon: Horizon) -> None:
        self.peak = peak
        self.horizon = horizon
        self._problems: list[Problem] = []
        self.warmup = Duration.parse(config.warmup)
        self._warmup_unit = horizon.unit if self.warmup.unit is Unit.FRACTION else self.warmup.unit
        self._warmup_length = self._amount("warmup", self.warmup, self._warmup_unit)
        if self._end_of_warmup() > horizon.total:
            self._problem(
                "schedule.warmup", f"{self.warmup} is longer than the run ({horizon.length})", "shorten it or lengthen the run"
            )

    def problems(self) -> list[Problem]:
        """Return what a user must change before this schedule can be used; empty if nothing."""
        return list(self._problems)

    def lr(self, progress: Progress) -> float:
        """Return the learning rate of the step about to be taken."""
        return self.warmup_factor(progress) * self.base_lr(progress)

    def base_lr(self, progress: Progress) -> float:
        """Return the learning rate without the warm-up's factor."""
        return self.peak

    def warmup_factor(self, progress: Progress) -> float:
        """Return the warm-up's factor, which is 1 after it."""
        if self._warmup_length <= 0:
            return 1.0
        at = self.horizon.position(progress, self._warmup_unit) + self.horizon.stride(progress, self._warmup_unit)
        return min(1.0, at / self._warmup_length)

    def _problem(self, key: str, message: str, fix: str) -> None:
        self._problems.append(Problem(key, message, fix))

    def _amount(self, key: str, duration: Duration, unit: Unit) -> float:
        """Convert a duration to `unit`; record a problem and return 0 where there is no answer."""
        try:
            return self.horizon.amount(duration, unit)
        except ValueError as error:
            run = f"the run's length ({self.horizon.length}) and schedule.{key}"
            self._problem(f"schedule.{key}", str(error), f"write {run} in tokens or samples, or {key} as a fraction")
            return 0.0

    def _end_of_warmup(self) -> float:
        """Return where the warm-up ends in the unit of the run's length, as far as known before the start; else 0."""
        end = self.horizon.after_start(self.warmup, self.horizon.unit, self.horizon.begun)
        return end if math.isfinite(end) else 0.0


class Constant(Schedule):
    """The peak, after the warm-up."""


class _DecayToEnd(Schedule):
    """Base of decays from the peak at the end of the warm-up to `final` × peak at the end of the run."""

    def __init__(self, config: CosineConfig | LinearConfig, peak: float, horizon: Horizon) -> None:
        super().__init__(config, peak, horizon)
        self.final = config.final

    def _elapsed_fraction(self, progress: Progress) -> float:
        """Return how much of the way from the warm-up's end to the run's end is done, in [0, 1]."""
        start = self.horizon.after_start(self.warmup, self.horizon.unit, progress)
        length = self.horizon.total - start
        if length <= 0:
            return 0.0
        return min(1.0, max(0.0, (self.horizon.position(progress, self.horizon.unit) - start) / length))


class Cosine(_DecayToEnd):
    """Half a cosine wave from the peak down to `final` × peak (Loshchilov and Hutter, arXiv 1608.03983)."""

    def base_lr(self, progress: Progress) -> float:
        """Return the learning rate without the warm-up's factor."""
        return self.peak * (self.final + (1 - self.final) * cosine(self._elapsed_fraction(progress)))


class Linear(_DecayToEnd):
    """A straight line from the peak down to `final` × peak."""

    def base_lr(self, progress: Progress) -> float:
        """Return the learning rate without the warm-up's factor."""
        return self.peak * (self.final + (1 - self.final) * linear(self._elapsed_fraction(progress)))
