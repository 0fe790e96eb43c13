"""Config of `batch`: how many samples a step takes, and how many a rank takes at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ...config.keys import MISSING, RecipeWhen, Side, key, option, target
from ...config.nodes import Custom
from ...config.problems import Problem
from ..optimizers.config import AUTOMATIC

START = "global batch in sequences at the start, or auto:step_law"
MICRO = "sequences per rank and pass"
MICRO_MAX = "a micro-batch doubles up to this size while a step keeps as many as the run started with; null: it stays at micro"
MULTIPLE = "sizes between samples and max are multiples of this; null: of micro where gradients are measured, else of 1"
LARGEST = "the largest size"


def _micro_matters(run: Any) -> bool:
    return run.batch.MEASURES or run.optim.compares_halves() or run.trainer.float8 != "none"


MICRO_SIDE = RecipeWhen("a controller that measures gradients, optim=agvm or trainer.float8", _micro_matters)
"""Micro-batches are the workers of gradient statistics and make up AGVM's halves, and float8 scales are taken of each."""


@dataclass
class BatchConfig:
    """Keys of every controller of the batch size.

    MEASURES  whether the controller is given gradient statistics
    """

    SIDE: ClassVar[Side] = Side.RECIPE
    MEASURES: ClassVar[bool] = False

    _target_: str = target(MISSING)
    name: str = option(MISSING)
    samples: int | str | None = key(32, START)
    micro: int = key(8, MICRO, MICRO_SIDE)

    def problems(self, key: str = "batch") -> list[Problem]:
        """Return what is wrong with the values. The controller itself checks them against the run."""
        found: list[Problem] = []
        if isinstance(self.samples, str) and not self.samples.startswith(AUTOMATIC):
            found.append(Problem(f"{key}.samples", f"'{self.samples}' is not a number", f"write one, or {AUTOMATIC}step_law"))
        for name, size in (("samples", self.samples), ("micro", self.micro)):
            if isinstance(size, int) and size < 1:
                found.append(Problem(f"{key}.{name}", f"{size} is not a number of samples", "use 1 or more"))
        return found

    @property
    def largest_micro(self) -> int:
        """The largest size of a micro-batch."""
        return getattr(self, "micro_max", None) or self.micro


class CustomBatch(BatchConfig, Custom):
    """A controller of the user's own. It is taken to measure, because its class does not say."""

    MEASURES = True


@dataclass
class FixedConfig(BatchConfig):
    """The same size at every step."""

    _target_: str = target("meshloom.optim.batch.controller.Fixed")
    name: str = option("fixed")


@dataclass
class StagesConfig(BatchConfig):
    """Sizes by tokens consumed."""

    _target_: str = target("meshloom.optim.batch.controller.Stages")
    name: str = option("stages")
    samples: int | str | None = key(None, "the size at the start, read where stages doesn't begin with 0")
    micro_max: int | None = key(None, MICRO_MAX, MICRO_SIDE)
    stages: str = key(MISSING, 'sizes from points on, such as "0:768 250B:1536"; a bare point counts tokens')


@dataclass
class RampConfig(BatchConfig):
    """From samples to max on a straight line over a duration."""

    _target_: str = target("meshloom.optim.batch.controller.Ramp")
    name: str = option("ramp")
    micro_max: int | None = key(None, MICRO_MAX, MICRO_SIDE)
    max: int = key(512, LARGEST)
    over: int | float | str = key("10%", "how long the way up takes: a duration")
    multiple: int | None = key(None, MULTIPLE)


@dataclass
class AdaptiveConfig(BatchConfig):
    """Keys of every controller that measures."""

    MEASURES: ClassVar[bool] = True

    micro_max: int | None = key(None, MICRO_MAX, MICRO_SIDE)
    max: int = key(512, LARGEST)
    eta: float = key(0.2, "threshold of the test")
    interval: int = key(1, "steps between decisions")
    ema: float = key(0.0, "weight of the past in what decisions are taken from; 0: the newest measurement alone")
    growth: float | None = key(2.0, "largest factor of one change; null: no limit")
    shrink: bool = key(False, "whether the size may fall again")
    multiple: int | None = key(None, MULTIPLE)


@dataclass
class NormTestConfig(AdaptiveConfig):
    """Grow when the gradient is noisier than eta × its norm. A batch that passes is about (1 − eta²) / eta² noise scales.

    The defaults are the ones measured in docs/batch.md.
    """

    _target_: str = target("meshloom.optim.batch.adaptive.NormTest")
    name: str = option("norm_test")
    eta: float = key(0.7, "threshold of the test: gradient noise at most eta × the gradient's norm")
    interval: int = key(4, "steps between decisions")
    ema: float = key(0.9, "weight of the past in what decisions are taken from; 0: the newest measurement alone")
    growth: float | None = key(1.5, "largest factor of one change; null: no limit")
    shrink: bool = key(True, "whether the size may fall again")
    unbiased: bool = key(
        False, "compare with an unbiased estimate of the gradient's norm, in which noise does not count as signal"
    )
    literal: bool = key(
        False, "the test as the papers' text can be read: the variance of workers' means, which asks for smaller batches"
    )


@dataclass
class InnerProductConfig(AdaptiveConfig):
    """Grow when the gradient is noisier than eta × its norm along its own direction."""

    _target_: str = target("meshloom.optim.batch.adaptive.InnerProduct")
    name: str = option("inner_product")
    eta: float = key(0.5, "threshold of the test: noise along the gradient at most eta × its norm")


@dataclass
class AugmentedConfig(InnerProductConfig):
    """The inner-product test, and a bound nu on the noise across the gradient."""

    _target_: str = target("meshloom.optim.batch.adaptive.Augmented")
    name: str = option("augmented")
    nu: float = key(1.0, "noise across the gradient at most nu × its norm")


@dataclass
class NoiseScaleConfig(AdaptiveConfig):
    """eta × the gradient noise scale (arXiv 1812.06162), smoothed."""

    _target_: str = target("meshloom.optim.batch.adaptive.NoiseScale")
    name: str = option("noise_scale")
    eta: float = key(1.0, "the size in noise scales")
    interval: int = key(10, "steps between decisions")
    ema: float = key(0.95, "weight of the past in what decisions are taken from; 0: the newest measurement alone")
    growth: float | None = key(1.25, "largest factor of one change; null: no limit")


@dataclass
class CriticalLossConfig(AdaptiveConfig):
    """eta × the critical batch of the loss reached, tokens / loss^(1 / alpha) (arXiv 2001.08361)."""

    MEASURES: ClassVar[bool] = False

    _target_: str = target("meshloom.optim.batch.adaptive.CriticalLoss")
    name: str = option("critical_loss")
    eta: float = key(1.0, "the size in critical batches")
    interval: int = key(10, "steps between decisions")
    ema: float = key(0.95, "weight of the past in what decisions are taken from; 0: the newest measurement alone")
    growth: float | None = key(1.25, "largest factor of one change; null: no limit")
    tokens: float = key(2.1e8, "factor of the critical batch, in tokens; fit it to your own runs")
    alpha: float = key(0.21, "exponent of the critical batch; fit it to your own runs")


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
