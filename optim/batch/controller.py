"""Batch-size controllers decide how many samples the next step takes. Here: planned sizes; adaptive.py has measured ones.

A controller decides from the run's progress and, where it measures, from numbers that are the same on every rank. Its
decision is a function of progress and of its saved state, so it is the same on every rank and after every resume.

No size has to divide by anything of the layout: the assignment (`data/assignment.py`) deals any batch to any number of ranks.

A larger batch is accumulated from more micro-batches. With `batch.micro_max` the micro-batch also grows, by doublings. Fewer
and larger micro-batches take less time and more memory.
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


class Controller:
    """Base of the controllers: a size that never changes.

    horizon    the length of the run
    samples    the size at the start
    micro      samples of a micro-batch
    max        the largest size; None: no limit
    multiple   sizes between `samples` and `max` are multiples of this. None: of `micro` where gradients are measured, because
               the micro-batches are then the workers of the statistics; of 1 elsewhere
    micro_max  a micro-batch may be doubled up to this size: `micro` times a power of two. None: it stays at `micro`

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
        samples: int,
        micro: int,
        max: int | None = None,
        multiple: int | None = None,
        micro_max: int | None = None,
    ) -> None:
        self.horizon = horizon
        self.samples = samples
        self.micro = micro
        self.max = max
        self.multiple = multiple if multiple is not None else micro if self.needs_statistics else 1
        self._micro_max = micro if micro_max is None else micro_max
        self._problems: list[Problem] = []
        self._check_size("batch.samples", samples)
        if self.multiple < 1:
            self._problem("batch.multiple", f"{self.multiple} is not a number of samples", "use 1 or more, or leave it out")
            self.multiple = 1
        if max is not None and max < samples:
            self._problem("batch.max", f"{max} is less than batch.samples={samples}", "raise it")
        growth = self._micro_max / micro
        if growth < 1 or not math.log2(growth).is_integer():
            what = f"is {growth:g} times batch.micro, which doublings don't reach"
            self._problem("batch.micro_max", what, "use 2, 4, 8 … times batch.micro, or leave it out")
            self._micro_max = micro

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
        """Round up to a size that a step may have: `samples`, `max`, or a multiple of `multiple` in between.

        Where gradients are measured and the micro-batch has grown, it is also a multiple of that.
        """
        if size <= self.samples:
            return self.samples
        most = math.inf if self.max is None else self.max
        unit = self.multiple
        if self.needs_statistics and size < most and (micro := self.micro_at(int(size))) > self.micro:
            unit = math.lcm(unit, micro)
        return int(most if size >= most else min(most, math.ceil(size / unit) * unit))

    def micro_at(self, size: int) -> int:
        """Return how many samples a micro-batch has in a step of `size` samples.

        It is doubled, up to `micro_max`, while the step keeps at least as many full micro-batches as the run started with.
        """
        at_start = -(-self.samples // self.micro)
        micro = self.micro
        while 2 * micro <= self._micro_max and size >= 2 * micro * at_start:
            micro *= 2
        return micro

    def _problem(self, key: str, message: str, fix: str) -> None:
        self._problems.append(Problem(key, message, fix))

    def _check_size(self, key: str, size: int) -> None:
        if size < 1:
            self._problem(key, f"{size} is not a number of samples", "use 1 or more")


class Fixed(Controller):
    """The same size at every step."""

    def __init__(self, horizon: Horizon, samples: int, micro: int) -> None:
        super().__init__(horizon, samples, micro)


class Stages(Controller):
    """Sizes that the config lists.

    stages   "0:768 250B:1536": from each point on, that many samples. A bare number counts tokens; other durations are
             written without spaces ("10%:64", "2000steps:64")
    samples  the size before the first point; not read where that is 0
    """

    def __init__(
        self, horizon: Horizon, stages: str, micro: int, samples: int | None = None, micro_max: int | None = None
    ) -> None:
        parts = [self._read(written) for written in re.split(r"[\s,]+", stages.strip()) if written]
        self._stages = [part for part in parts if part is not None]
        first = next((size for start, size in self._stages if start.value == 0), None)
        start = samples if first is None else first
        super().__init__(horizon, micro if start is None else start, micro, micro_max=micro_max)
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
    """Sizes that rise from `samples` to `max` on a straight line over `over`, in multiples of `multiple`.

    over  length of the ramp: a duration as for schedules
    """

    def __init__(
        self,
        horizon: Horizon,
        samples: int,
        micro: int,
        max: int,
        over: str | int | float,
        multiple: int | None = None,
        micro_max: int | None = None,
    ) -> None:
        super().__init__(horizon, samples, micro, max, multiple, micro_max)
        self._over = Duration(1, Unit.STEPS)
        try:
            self._over = Duration.parse(over)
        except ValueError as error:
            what, _, fix = str(error).partition("; ")
            self._problem("batch.over", what, fix)
        if self._over.value <= 0:
            self._problem("batch.over", "a ramp needs a length", "give a duration, or choose batch=fixed")

    def next_batch(self, progress: Progress) -> int:
        """Return the size on the line from (0, samples) to (over, max), rounded down."""
        assert self.max is not None
        unit = self.horizon.unit if self._over.unit is Unit.FRACTION else self._over.unit
        part = min(1.0, self.horizon.position(progress, unit) / self.horizon.amount(self._over, unit))
        reached = self.samples + int(part * (self.max - self.samples))
        return self.max if reached == self.max else max(self.samples, reached // self.multiple * self.multiple)
