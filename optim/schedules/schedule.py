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
from .decay import cosine, linear

Written = str | int | float
"""A duration as a user writes it: see `config.duration.Duration`."""


class Schedule:
    """Constant after the warm-up; the base of the others.

    peak     the learning rate after the warm-up
    horizon  the length of the run
    warmup   how long the rate rises linearly from 0

    A subclass says in `settled` what follows the warm-up. What is wrong with the settings is collected, not raised:
    see `problems`.
    """

    def __init__(self, peak: float, horizon: Horizon, warmup: Written = 0) -> None:
        self.peak = peak
        self.horizon = horizon
        self._problems: list[Problem] = []
        if peak <= 0:
            self._problem("optim.lr", f"a learning rate of {peak:g} trains nothing", "give a positive one")
        self.warmup = self._duration("warmup", warmup)
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

    def _duration(self, key: str, written: Written) -> Duration:
        """Read the setting `schedule.<key>`; a mistake becomes a problem."""
        try:
            return Duration.parse(written)
        except ValueError as error:
            self._problem(f"schedule.{key}", *_split(str(error)))
            return Duration(0, Unit.STEPS)

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

    def _final(self, final: float) -> float:
        """Check the ratio of the last learning rate to the first."""
        if not 0 <= final <= 1:
            self._problem("schedule.final", f"{final:g} is not a fraction of the peak", "give a number in [0, 1]")
        return final


def _split(message: str) -> tuple[str, str]:
    """A message "what; fix" in its two halves."""
    what, _, fix = message.partition("; ")
    return what, fix


class Constant(Schedule):
    """The peak, after the warm-up."""


class _ToTheEnd(Schedule):
    """From the peak at the end of the warm-up to `final` × peak at the end of the run, along a shape."""

    def __init__(self, peak: float, horizon: Horizon, warmup: Written = 0, final: float = 0.0) -> None:
        super().__init__(peak, horizon, warmup)
        self.final = self._final(final)

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
