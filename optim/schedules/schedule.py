"""Learning-rate schedules: pure functions of how far the run has come (rule R5).

A schedule holds its settings and nothing else, so a resumed run, on any layout and at any batch size, has the learning
rate that an uninterrupted one has. Durations in another unit than the run's length are converted by what past steps were
really worth (`Progress.history`), so a batch that is changed on a resume moves nothing that lies behind.

Where two counters could be meant: the warm-up is read at the *end* of the step about to be taken (the first of W warm-up
steps has peak / W, not 0), everything else at its beginning.
"""

from __future__ import annotations

from ...config.duration import Duration, Unit
from ...config.problems import Problem
from ..horizon import Horizon
from ..progress import Progress
from .config import CosineConfig, LinearConfig, ScheduleConfig
from .decay import cosine, linear


class Schedule:
    """Constant after the warm-up; the base of the others.

    config   settings without problems of their own
    peak     the learning rate after the warm-up
    horizon  the length of the run

    A subclass says in `settled` what follows the warm-up. Settings that don't fit the run's length are collected, not raised:
    see `problems`.
    """

    def __init__(self, config: ScheduleConfig, peak: float, horizon: Horizon) -> None:
        self.peak = peak
        self.horizon = horizon
        self._problems: list[Problem] = []
        self.warmup = Duration.parse(config.warmup)
        self._warmup_unit = horizon.unit if self.warmup.unit is Unit.FRACTION else self.warmup.unit
        self._warmup_length = self._amount("warmup", self.warmup, self._warmup_unit)
        if self._known(self.warmup) > horizon.total:
            self._problem(
                "schedule.warmup", f"{self.warmup} is longer than the run ({horizon.length})", "shorten it or lengthen the run"
            )

    def problems(self) -> list[Problem]:
        """What a user must change before this schedule can be used; empty if nothing."""
        return list(self._problems)

    def lr(self, progress: Progress) -> float:
        """The learning rate of the step about to be taken."""
        return self.warmed(progress) * self.settled(progress)

    def settled(self, progress: Progress) -> float:
        """The learning rate but for the warm-up's factor."""
        return self.peak

    def warmed(self, progress: Progress) -> float:
        """The warm-up's factor, which is 1 once it is over."""
        if self._warmup_length <= 0:
            return 1.0
        at = self.horizon.position(progress, self._warmup_unit) + self.horizon.stride(progress, self._warmup_unit)
        return min(1.0, at / self._warmup_length)

    def _problem(self, key: str, message: str, fix: str) -> None:
        self._problems.append(Problem(key, message, fix))

    def _amount(self, key: str, duration: Duration, unit: Unit) -> float:
        """`duration` in `unit`; a conversion that has no answer becomes a problem."""
        try:
            return self.horizon.amount(duration, unit)
        except ValueError as error:
            run = f"the run's length ({self.horizon.length}) and schedule.{key}"
            self._problem(f"schedule.{key}", str(error), f"write {run} in tokens or samples, or {key} as a fraction")
            return 0.0

    def _known(self, duration: Duration) -> float:
        """`duration` in the run's unit where it has a fixed answer, else 0."""
        try:
            return self.horizon.amount(duration, self.horizon.unit)
        except ValueError:
            return 0.0


class Constant(Schedule):
    """The peak, after the warm-up."""


class _ToTheEnd(Schedule):
    """From the peak at the end of the warm-up to `final` × peak at the end of the run, along a shape."""

    def __init__(self, config: CosineConfig | LinearConfig, peak: float, horizon: Horizon) -> None:
        super().__init__(config, peak, horizon)
        self.final = config.final

    def _part(self, progress: Progress) -> float:
        """How much of the way from the warm-up's end to the run's end is behind, in [0, 1]."""
        start = self.horizon.reach(self.warmup, self.horizon.unit, progress)
        length = self.horizon.total - start
        if length <= 0:
            return 0.0
        return min(1.0, max(0.0, (self.horizon.position(progress, self.horizon.unit) - start) / length))


class Cosine(_ToTheEnd):
    """Half a cosine wave from the peak down to `final` × peak (Loshchilov and Hutter, arXiv 1608.03983)."""

    def settled(self, progress: Progress) -> float:
        """See the class."""
        return self.peak * (self.final + (1 - self.final) * cosine(self._part(progress)))


class Linear(_ToTheEnd):
    """A straight line from the peak down to `final` × peak."""

    def settled(self, progress: Progress) -> float:
        """See the class."""
        return self.peak * (self.final + (1 - self.final) * linear(self._part(progress)))
