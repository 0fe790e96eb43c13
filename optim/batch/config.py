"""Config of `batch`: how many samples a step takes, and how many a rank takes at once."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from ...config.duration import Duration
from ...config.keys import MISSING, RecipeWhen, Side, key, option, target
from ...config.nodes import Custom
from ...config.problems import Problem
from ..optimizers.config import AUTOMATIC

START = "global batch in sequences at the start, or auto:step_law"
MICRO = "sequences per rank and pass; auto: the fastest that a plan fits into the GPUs that the run is started on"
FITTED = "auto"
"""The value of a key that a plan decides, by what fits: `trainer/fitting.py`."""
MICRO_MAX = "a micro-batch doubles up to this size while a step keeps as many as the run started with; null: it stays at micro"
MULTIPLE = "sizes between samples and max are multiples of this; null: of micro where gradients are measured, else of 1"
LARGEST = "the largest size"
KAPLAN_TOKENS, KAPLAN_ALPHA = 2.1e8, 0.21
"""Kaplan's constants of the critical batch (arXiv 2001.08361): B_* in tokens, and α_B."""


def _micro_matters(run: Any) -> bool:
    compared = run.batch.MEASURES or run.optim.compares_halves() or run.trainer.float8 != "none"
    return compared or run.balance.depends_on_micro_batches or run.model.drops_tokens


MICRO_SIDE = RecipeWhen(
    "a controller that measures gradients, optim=agvm, trainer.float8, balance.micro_batch, balance.counts=prefix or"
    " model.experts.capacity",
    _micro_matters,
)
"""Micro-batches are the workers of gradient statistics and make up AGVM's halves. Float8 scales, experts'
shares in losses of micro-batches, and the tokens that experts drop, are taken of each."""


@dataclass(frozen=True)
class BatchConfig:
    """Keys of every controller of the batch size.

    MEASURES      whether the controller is given gradient statistics
    HOW_TO_START  fix where the size at the start is not said
    """

    SIDE: ClassVar[Side] = Side.RECIPE
    MEASURES: ClassVar[bool] = False
    HOW_TO_START: ClassVar[str] = "give a number of samples"

    _target_: str = target(MISSING)
    name: str = option(MISSING)
    samples: int | str | None = key(32, START)
    micro: int | str = key(8, MICRO, MICRO_SIDE)

    def problems(self, key: str = "batch") -> list[Problem]:
        """Return what is wrong with the values. The controller itself checks them against the run."""
        found = [*size_problems(key, samples=self.samples, micro=self.micro)]
        if isinstance(self.samples, str) and not self.samples.startswith(AUTOMATIC):
            found.append(Problem(f"{key}.samples", f"'{self.samples}' is not a number", f"write one, or {AUTOMATIC}step_law"))
        if isinstance(self.micro, str) and self.micro != FITTED:
            found.append(Problem(f"{key}.micro", f"'{self.micro}' is not a number", f"write one, or {FITTED}"))
        if self.samples is None:
            found.append(Problem(f"{key}.samples", "how the run starts is not said", self.HOW_TO_START))
        return found

    @property
    def micro_size(self) -> int:
        """The size of a micro-batch as a number, after a plan has decided it."""
        assert isinstance(self.micro, int), "a plan decides batch.micro before anything reads it"
        return self.micro

    @property
    def largest_micro(self) -> int:
        """The largest size of a micro-batch."""
        return self.micro_size

    @property
    def rounded_to(self) -> int | None:
        """Return the number that sizes are multiples of, where the config says it."""
        return None

    @property
    def start(self) -> int:
        """The size at the start as a number, after a law has decided it."""
        assert isinstance(self.samples, int), "a law decides batch.samples before a controller is built"
        return self.samples


def size_problems(key: str, **sizes: int | str | None) -> Iterator[Problem]:
    """Yield a problem for each number of the group `key` that is not a number of samples."""
    for name, size in sizes.items():
        if isinstance(size, int) and size < 1:
            yield Problem(f"{key}.{name}", f"{size} is not a number of samples", "use 1 or more")


def _positive_problems(key: str, **settings: float) -> Iterator[Problem]:
    """Yield a problem for each threshold or constant that gives no finite, positive batch."""
    for name, value in settings.items():
        if not 0 < value < math.inf:
            yield Problem(f"{key}.{name}", f"{value:g} gives no batch", "use a positive number")


@dataclass(frozen=True)
class CustomBatch(BatchConfig, Custom):
    """A controller of the user's own. It is taken to measure, because its class does not say."""

    MEASURES = True


@dataclass(frozen=True)
class FixedConfig(BatchConfig):
    """The same size at every step."""

    _target_: str = target("meshloom.optim.batch.controller.Fixed")
    name: str = option("fixed")


@dataclass(frozen=True)
class GrowingConfig(BatchConfig):
    """Keys of every controller whose batch may change, and whose micro-batch may grow with it."""

    micro_max: int | None = key(None, MICRO_MAX, MICRO_SIDE)

    def problems(self, key: str = "batch") -> list[Problem]:
        """Return what is wrong with the values."""
        found = super().problems(key)
        if isinstance(self.micro, str):
            if self.micro_max is not None:
                text = f"it is a number of doublings of {key}.micro={self.micro}, which is none yet"
                found.append(Problem(f"{key}.micro_max", text, f"give {key}.micro as a number, or leave it out"))
            return found
        growth = self.largest_micro / self.micro if self.micro > 0 else 1
        if growth < 1 or not math.log2(growth).is_integer():
            what = f"is {growth:g} times {key}.micro, which doublings don't reach"
            found.append(Problem(f"{key}.micro_max", what, f"use 2, 4, 8 … times {key}.micro, or leave it out"))
        return found

    @property
    def largest_micro(self) -> int:
        """The largest size of a micro-batch."""
        return self.micro_size if self.micro_max is None else self.micro_max


@dataclass(frozen=True)
class BoundedConfig(GrowingConfig):
    """Keys of every controller whose batch moves between `samples` and `max`."""

    max: int = key(512, LARGEST)
    multiple: int | None = key(None, MULTIPLE)

    def problems(self, key: str = "batch") -> list[Problem]:
        """Return what is wrong with the values."""
        found = super().problems(key)
        if self.multiple is not None and self.multiple < 1:
            found.append(
                Problem(f"{key}.multiple", f"{self.multiple} is not a number of samples", "use 1 or more, or leave it out")
            )
        if isinstance(self.samples, int) and self.max < self.samples:
            found.append(Problem(f"{key}.max", f"{self.max} is less than {key}.samples={self.samples}", "raise it"))
        return found

    @property
    def rounded_to(self) -> int | None:
        """Return the number that sizes are multiples of, where the config says it."""
        return self.multiple


@dataclass(frozen=True)
class StagesConfig(GrowingConfig):
    """Sizes by tokens consumed."""

    HOW_TO_START: ClassVar[str] = "set it, or begin batch.stages with 0:<samples>"

    _target_: str = target("meshloom.optim.batch.controller.Stages")
    name: str = option("stages")
    samples: int | str | None = key(None, "the size at the start, read where stages doesn't begin with 0")
    stages: str = key(MISSING, 'sizes from points on, such as "0:768 250B:1536"; a bare point counts tokens')

    def problems(self, key: str = "batch") -> list[Problem]:
        """Return what is wrong with the values."""
        try:
            points, unread = self.points(), []
        except ValueError:
            fix = "write it as '0:768 250B:1536', points in tokens"
            points, unread = [], [Problem(f"{key}.stages", f"can't read '{self.stages}'", fix)]
        found = super().problems(key)
        if not points or points[0][0].value == 0:  # then `samples` is not read
            found = [problem for problem in found if problem.key != f"{key}.samples"]
        for _, size in points:
            found += size_problems(key, stages=size)
        return [*found, *unread]

    def points(self) -> list[tuple[Duration, int]]:
        """Return the points of the run that are written, each with its size. Raises ValueError for what can't be read."""
        parts = [_read_point(written) for written in re.split(r"[\s,]+", self.stages.strip()) if written]
        if not parts:
            raise ValueError("there are no points")
        return parts


def _read_point(written: str) -> tuple[Duration, int]:
    start, _, size = written.partition(":")
    named = re.search(r"[a-z]{4,}|%", start, re.I) is not None
    return Duration.parse(start if named else f"{start} tokens"), int(size)


@dataclass(frozen=True)
class RampConfig(BoundedConfig):
    """From samples to max on a straight line over a duration."""

    _target_: str = target("meshloom.optim.batch.controller.Ramp")
    name: str = option("ramp")
    over: int | float | str = key("10%", "how long the way up takes: a duration")

    def problems(self, key: str = "batch") -> list[Problem]:
        """Return what is wrong with the values."""
        found = super().problems(key)
        try:
            if Duration.parse(self.over).value <= 0:
                found.append(Problem(f"{key}.over", "a ramp needs a length", "give a duration, or choose batch=fixed"))
        except ValueError as error:
            what, _, fix = str(error).partition("; ")
            found.append(Problem(f"{key}.over", what, fix))
        return found


@dataclass(frozen=True)
class AdaptiveConfig(BoundedConfig):
    """Keys of every controller that measures.

    The defaults are those that docs/measurements/batch.md measured with the norm test. One step's measurement is noisy, and
    without `shrink` a batch that it has raised stays for the rest of the run.
    """

    MEASURES: ClassVar[bool] = True

    eta: float = key(0.2, "threshold of the test")
    interval: int = key(4, "steps between decisions")
    ema: float = key(0.9, "weight of the past in what decisions are taken from; 0: the newest measurement alone")
    growth: float | None = key(1.5, "largest factor of one change; null: no limit")
    shrink: bool = key(True, "whether the size may fall again")

    def problems(self, key: str = "batch") -> list[Problem]:
        """Return what is wrong with the values."""
        found = super().problems(key)
        if self.interval < 1:
            found.append(Problem(f"{key}.interval", f"{self.interval} steps are no interval", "use 1 or more"))
        if not 0 <= self.ema < 1:
            found.append(Problem(f"{key}.ema", f"{self.ema:g} is not a weight of the past", "use a number in [0, 1)"))
        if self.growth is not None and not self.growth > 1:
            what = f"a factor of {self.growth:g} lets nothing grow"
            found.append(Problem(f"{key}.growth", what, "use more than 1, or null"))
        return [*found, *_positive_problems(key, eta=self.eta)]


@dataclass(frozen=True)
class NormTestConfig(AdaptiveConfig):
    """Grow when the gradient is noisier than eta × its norm. A batch that passes is about (1 − eta²) / eta² noise scales."""

    _target_: str = target("meshloom.optim.batch.adaptive.NormTest")
    name: str = option("norm_test")
    eta: float = key(0.7, "threshold of the test: gradient noise at most eta × the gradient's norm")
    unbiased: bool = key(
        False, "compare with an unbiased estimate of the gradient's norm, in which noise does not count as signal"
    )
    literal: bool = key(
        False, "the test as the papers' text can be read: the variance of workers' means, which asks for smaller batches"
    )


@dataclass(frozen=True)
class InnerProductConfig(AdaptiveConfig):
    """Grow when the gradient is noisier than eta × its norm along its own direction."""

    _target_: str = target("meshloom.optim.batch.adaptive.InnerProduct")
    name: str = option("inner_product")
    eta: float = key(0.5, "threshold of the test: noise along the gradient at most eta × its norm")


@dataclass(frozen=True)
class AugmentedConfig(InnerProductConfig):
    """The inner-product test, and a bound nu on the noise across the gradient."""

    _target_: str = target("meshloom.optim.batch.adaptive.Augmented")
    name: str = option("augmented")
    nu: float = key(1.0, "noise across the gradient at most nu × its norm")

    def problems(self, key: str = "batch") -> list[Problem]:
        """Return what is wrong with the values."""
        return [*super().problems(key), *_positive_problems(key, nu=self.nu)]


@dataclass(frozen=True)
class NoiseScaleConfig(AdaptiveConfig):
    """eta × the gradient noise scale (arXiv 1812.06162), smoothed longer, because the unbiased estimate is the noisier one."""

    _target_: str = target("meshloom.optim.batch.adaptive.NoiseScale")
    name: str = option("noise_scale")
    eta: float = key(1.0, "the size in noise scales")
    interval: int = key(10, "steps between decisions")
    ema: float = key(0.95, "weight of the past in what decisions are taken from; 0: the newest measurement alone")
    growth: float | None = key(1.25, "largest factor of one change; null: no limit")


@dataclass(frozen=True)
class CriticalLossConfig(AdaptiveConfig):
    """eta × the critical batch of the loss reached, tokens / loss^(1 / alpha) (arXiv 2001.08361).

    The size does not fall by default: the loss falls along a run, and a spike of it asks for no smaller batch.
    """

    MEASURES: ClassVar[bool] = False

    _target_: str = target("meshloom.optim.batch.adaptive.CriticalLoss")
    name: str = option("critical_loss")
    eta: float = key(1.0, "the size in critical batches")
    interval: int = key(10, "steps between decisions")
    ema: float = key(0.95, "weight of the past in what decisions are taken from; 0: the newest measurement alone")
    growth: float | None = key(1.25, "largest factor of one change; null: no limit")
    shrink: bool = key(False, "whether the size may fall again")
    tokens: float = key(KAPLAN_TOKENS, "factor of the critical batch, in tokens; fit it to your own runs")
    alpha: float = key(KAPLAN_ALPHA, "exponent of the critical batch; fit it to your own runs")

    def problems(self, key: str = "batch") -> list[Problem]:
        """Return what is wrong with the values."""
        return [*super().problems(key), *_positive_problems(key, tokens=self.tokens, alpha=self.alpha)]


OPTIONS: tuple[type, ...] = (
    FixedConfig,
    StagesConfig,
    RampConfig,
    NormTestConfig,
    InnerProductConfig,
    AugmentedConfig,
    NoiseScaleConfig,
    CriticalLossConfig,
)
"""Schemas of the group, known to Hydra as batch/base_<name>; the recipes of the group extend them."""
