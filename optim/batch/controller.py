"""Batch-size controllers decide how many samples the next step takes. Here: planned sizes; adaptive.py has measured ones.

A controller decides from the run's progress and, where it measures, from numbers that are the same on every rank. Its
decision is a function of progress and of its saved state, so it is the same on every rank and after every resume.

Sizes are multiples of `multiple`. Its default is what the layout asks for (batch.micro × data-parallel size), and then
rounding makes a run's sizes depend on its layout. With `batch.multiple` set they don't, as long as every layout of the run
can cut it.

A larger batch is accumulated from more micro-batches. With `batch.micro_max` the micro-batch also grows, by doublings, once
every rank has enough of them. Fewer and larger micro-batches take less time and more memory.
"""

from __future__ import annotations

import math
import re
from itertools import pairwise
from typing import Any

from ...config.duration import Duration, Unit
from ...config.problems import Problem
from ..horizon import Horizon
from ..progress import Progress
from .statistics import GradientStatistics

MIN_MICRO_BATCHES = 2
"""A micro-batch is doubled only where a rank keeps so many: gradient statistics measure how they differ."""


class Controller:
    """Base of the controllers: a size that never changes.

    horizon   the length of the run
    divisor   batch.micro × data-parallel size; the layout asks every size to be a multiple of it
    samples   the size at the start
    max       the largest size; None: no limit
    multiple  sizes are multiples of this; None: of `divisor`
    micro_growth  batch.micro_max / batch.micro, a power of two: how far a micro-batch may grow

    needs_loss         whether `observe` must be called with the step's loss
    needs_statistics   whether `observe` must be given a `GradientStatistics`, at steps where `measures` says so
    needs_projections  whether that must carry `projection_square`
    """

    needs_loss = False
    needs_statistics = False
    needs_projections = False

    def __init__(
        self,
        horizon: Horizon,
        divisor: int,
        samples: int,
        max: int | None = None,
        multiple: int | None = None,
        micro_growth: float = 1,
    ) -> None:
        self.horizon = horizon
        self.samples = samples
        self.max = max
        self.multiple = divisor if multiple is None else multiple
        self._divisor = divisor
        self._problems: list[Problem] = []
        if multiple is not None and (multiple < 1 or multiple % divisor):
            self._problem(
                "batch.multiple",
                f"{multiple} is not a multiple of batch.micro × data-parallel size = {divisor}",
                f"use {_nearest_legal(multiple, divisor)}, or leave it out",
            )
            self.multiple = divisor
        self._check_size("batch.samples", samples)
        if max is not None and max < samples:
            self._problem("batch.max", f"{max} is less than batch.samples={samples}", "raise it")
        self._micro_growth = micro_growth
        if micro_growth < 1 or not math.log2(micro_growth).is_integer():
            what = f"is {micro_growth:g} times batch.micro, which doublings don't reach"
            self._problem("batch.micro_max", what, "use 2, 4, 8 … times batch.micro, or leave it out")
            self._micro_growth = 1

    def problems(self) -> list[Problem]:
        """Return what a user must change before this controller can be used; empty if nothing."""
        return list(self._problems)

    @property
    def least(self) -> int:
        """The smallest size of any step."""
        return self.samples

    def next_batch(self, progress: Progress) -> int:
        """Return the samples of the step that begins at this progress."""
        return self.samples

    def measures(self, progress: Progress) -> bool:
        """Return whether `observe` needs the statistics of the step that begins at this progress."""
        return self.needs_statistics

    def observe(self, statistics: GradientStatistics | None, loss: float, progress: Progress) -> None:
        """Take in the measurements of the step just done. progress: after it; loss: its mean over the global batch."""

    @property
    def noise_scale(self) -> float | None:
        """The noise scale as measured so far, in samples; None where it isn't measured."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return the state as JSON values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""

    def rounded(self, size: float) -> int:
        """Round up to the smallest legal size of at least `size`, or down to the largest legal one.

        Where micro-batches may grow, a legal size is a whole number of the micro-batches grown for it.
        """
        size = size if self.max is None else min(size, self.max)
        unit = self.multiple * _doublings(self._micro_growth, size / self.multiple)
        most = math.inf if self.max is None else max(unit, self.max // unit * unit)
        return int(min(most, max(1, math.ceil(size / unit)) * unit))

    def micro_factor(self, size: int) -> int:
        """Return how many times batch.micro the micro-batches of a step of `size` samples are."""
        count, rest = divmod(size, self._divisor)
        whole = math.gcd(count, 2**30) if not rest else 1  # the doublings that cut it evenly
        return min(whole, _doublings(self._micro_growth, count))

    def _problem(self, key: str, message: str, fix: str) -> None:
        self._problems.append(Problem(key, message, fix))

    def _check_size(self, key: str, size: int) -> None:
        """Refuse an illegal size that a user wrote, rather than round it silently."""
        if size < 1:
            self._problem(key, f"{size} samples are no batch", f"use {self._divisor}")
        elif size % self._divisor:
            message = f"{size} is not a multiple of batch.micro × data-parallel size = {self._divisor}"
            self._problem(key, message, f"use {_nearest_legal(size, self._divisor)}")
        elif size % self.multiple:
            message = f"{size} is not a multiple of batch.multiple={self.multiple}"
            self._problem(key, message, f"use {_nearest_legal(size, self.multiple)}")


def _doublings(most: float, count: float) -> int:
    """Find the largest power of two, at most `most`, that leaves MIN_MICRO_BATCHES of `count` micro-batches."""
    factor = 1
    while 2 * factor <= most and 2 * factor * MIN_MICRO_BATCHES <= count:
        factor *= 2
    return factor


def _nearest_legal(size: int, divisor: int) -> str:
    """Word the legal sizes next to an illegal one."""
    below = size // divisor * divisor
    return f"{below} or {below + divisor}" if below > 0 else str(divisor)


class Fixed(Controller):
    """The same size at every step."""

    def __init__(self, horizon: Horizon, divisor: int, samples: int) -> None:
        super().__init__(horizon, divisor, samples)


class Stages(Controller):
    """Sizes that the config lists.

    stages   "0:768 250B:1536": from each point on, that many samples. A bare number counts tokens; other durations are
             written without spaces ("10%:64", "2000steps:64")
    samples  the size before the first point; not read where that is 0
    """

    def __init__(
        self, horizon: Horizon, divisor: int, stages: str, samples: int | None = None, micro_growth: float = 1
    ) -> None:
        parts = [self._read(written) for written in re.split(r"[\s,]+", stages.strip()) if written]
        self._stages = [part for part in parts if part is not None]
        first = next((size for start, size in self._stages if start.value == 0), None)
        start = samples if first is None else first
        super().__init__(horizon, divisor, divisor if start is None else start, micro_growth=micro_growth)
        if not parts or None in parts:
            self._problem("batch.stages", f"can't read '{stages}'", "write it as '0:768 250B:1536', points in tokens")
        if start is None:
            self._problem("batch.samples", "how the run starts is not said", "set it, or begin batch.stages with 0:<samples>")
        for _, size in self._stages:
            if size != first:
                self._check_size("batch.stages", size)
        try:
            order = [horizon.amount(start, horizon.unit) for start, _ in self._stages]
        except ValueError:
            order = []  # points in different units without an exchange rate keep the order written
        if any(later <= earlier for earlier, later in pairwise(order)):
            self._problem("batch.stages", f"the points of '{stages}' don't rise", "write them in order")

    @staticmethod
    def _read(written: str) -> tuple[Duration, int] | None:
        start, colon, size = written.partition(":")
        try:
            named = re.search(r"[a-z]{4,}|%", start, re.I) is not None
            return (Duration.parse(start if named else f"{start} tokens"), int(size)) if colon else None
        except ValueError:
            return None

    @property
    def least(self) -> int:
        """The smallest size of any stage."""
        return min([self.samples, *(size for _, size in self._stages)])

    def next_batch(self, progress: Progress) -> int:
        """Return the size of the last point reached."""
        size = self.samples
        for start, there in self._stages:
            unit = self.horizon.unit if start.unit is Unit.FRACTION else start.unit
            if self.horizon.position(progress, unit) >= self.horizon.amount(start, unit):
                size = there
        return size


class Ramp(Controller):
    """Sizes that rise from `samples` to `max` in equal steps of `multiple`, spread evenly over `over`.

    over  length of the ramp: a duration as for schedules
    """

    def __init__(
        self,
        horizon: Horizon,
        divisor: int,
        samples: int,
        max: int,
        over: str | int | float,
        multiple: int | None = None,
        micro_growth: float = 1,
    ) -> None:
        super().__init__(horizon, divisor, samples, max, multiple, micro_growth)
        self._check_size("batch.max", max)
        self._over = Duration(1, Unit.STEPS)
        try:
            self._over = Duration.parse(over)
        except ValueError as error:
            what, _, fix = str(error).partition("; ")
            self._problem("batch.over", what, fix)
        if self._over.value <= 0:
            self._problem("batch.over", "a ramp needs a length", "give a duration, or choose batch=fixed")

    def next_batch(self, progress: Progress) -> int:
        """Return the size on the line from (0, samples) to (over, max), rounded down to a legal one."""
        assert self.max is not None
        unit = self.horizon.unit if self._over.unit is Unit.FRACTION else self._over.unit
        part = min(1.0, self.horizon.position(progress, unit) / self.horizon.amount(self._over, unit))
        grown = part * (self.max - self.samples) // self.multiple * self.multiple
        return min(self.max, self.samples + int(grown))
