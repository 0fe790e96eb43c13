"""Batch-size controllers decide how many samples the next step takes. Here: planned sizes; adaptive.py has measured ones.

A controller decides from the run's progress and, where it measures, from numbers that are the same on every rank. Its
decision is a function of progress and of its saved state, so it is the same on every rank and after every resume.

No size has to divide by anything of the layout: the assignment (`data/assignment.py`) deals any batch to any number of ranks.

A larger batch is accumulated from more micro-batches. With `batch.micro_max` the micro-batch also grows, by doublings. Fewer
and larger micro-batches take less time and more memory.
"""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import Any

from ...config.duration import Duration, Unit
from ...config.problems import Problem
from ..horizon import Horizon
from ..progress import Progress
from .config import BatchConfig, RampConfig, StagesConfig
from .statistics import GradientStatistics


class Controller:
    """Base of the controllers: a size that never changes.

    config   settings without problems of their own
    horizon  the length of the run

    samples  the size at the start
    micro    samples of a micro-batch

    needs_loss         whether `observe` must be called with the step's loss
    needs_statistics   whether `observe` must be given a `GradientStatistics`, at steps where `measures` says so
    needs_projections  whether that must carry `projection_square`
    """

    needs_loss = False
    needs_statistics = False
    needs_projections = False

    def __init__(self, config: BatchConfig, horizon: Horizon) -> None:
        self.horizon = horizon
        self.samples = config.start
        self.micro = config.micro_size
        self._largest_micro = config.largest_micro

    def problems(self) -> list[Problem]:
        """Return what does not fit the run, and must be changed before this controller can be used; empty if nothing."""
        return []

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

    def micro_at(self, size: int) -> int:
        """Return how many samples a micro-batch has in a step of `size` samples.

        It is doubled, up to `micro_max`, while the step keeps at least as many full micro-batches as the run started with.
        """
        at_start = -(-self.samples // self.micro)
        micro = self.micro
        while 2 * micro <= self._largest_micro and size >= 2 * micro * at_start:
            micro *= 2
        return micro


class Fixed(Controller):
    """The same size at every step."""


class Stages(Controller):
    """Sizes that the config lists.

    stages   "0:768 250B:1536": from each point on, that many samples. A bare number counts tokens; other durations are
             written without spaces ("10%:64", "2000steps:64")
    samples  the size before the first point; not read where that is 0
    """

    def __init__(self, config: StagesConfig, horizon: Horizon) -> None:
        self._stages, self._written = config.points(), config.stages
        point, first = self._stages[0]
        super().__init__(dataclasses.replace(config, samples=first) if point.value == 0 else config, horizon)

    def problems(self) -> list[Problem]:
        """Return a problem if the points do not rise along the run."""
        try:
            order = [self.horizon.amount(start, self.horizon.unit) for start, _ in self._stages]
        except ValueError:
            return []  # points in different units without an exchange rate keep the order written
        if any(later <= earlier for earlier, later in pairwise(order)):
            return [Problem("batch.stages", f"the points of '{self._written}' don't rise", "write them in order")]
        return []

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
    """Sizes that rise from `samples` to `max` on a straight line over the duration `over`, in multiples of `multiple`."""

    def __init__(self, config: RampConfig, horizon: Horizon) -> None:
        super().__init__(config, horizon)
        self._max, self._multiple = config.max, config.multiple or 1
        self._over = Duration.parse(config.over)

    def next_batch(self, progress: Progress) -> int:
        """Return the size on the line from (0, samples) to (over, max), rounded down."""
        unit = self.horizon.unit if self._over.unit is Unit.FRACTION else self._over.unit
        part = min(1.0, self.horizon.position(progress, unit) / self.horizon.amount(self._over, unit))
        reached = self.samples + int(part * (self._max - self.samples))
        return self._max if reached == self._max else max(self.samples, reached // self._multiple * self._multiple)
