"""Config of `batch`: how many samples a step takes, and how many a rank takes at once."""

from __future__ import annotations

from dataclasses import dataclass

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING


@dataclass
class BatchConfig:
    """samples: global batch in sequences (its start, where a controller changes it), or auto:step_law; micro: sequences per
    rank and pass."""

    _target_: str = "meshloom.optim.batch.controller.Fixed"
    name: str = "fixed"
    samples: int | str = 32
    micro: int = 8


@dataclass
class StagesConfig:
    """stages: "0:768 250B:1536", sizes by tokens consumed; samples: the start, read where stages doesn't begin with 0;
    micro_max: see AdaptiveConfig."""

    _target_: str = "meshloom.optim.batch.controller.Stages"
    name: str = "stages"
    samples: int | None = None
    micro: int = 8
    micro_max: int | None = None
    stages: str = MISSING


@dataclass
class RampConfig:
    """From samples to max in equal steps of `multiple` (null: micro × data-parallel size) over a duration; micro_max: see
    AdaptiveConfig."""

    _target_: str = "meshloom.optim.batch.controller.Ramp"
    name: str = "ramp"
    samples: int | str = 32
    micro: int = 8
    micro_max: int | None = None
    max: int = MISSING
    over: int | float | str = "10%"
    multiple: int | None = None


@dataclass
class AdaptiveConfig:
    """What every measuring controller has.

    samples   the size at the start, and the smallest
    max       the largest
    eta       the test's threshold: see each
    interval  steps between decisions
    ema       weight of the past in what decisions are taken from; 0: the newest measurement alone
    growth    largest factor of one change; null: no limit
    shrink    whether the size may fall again
    multiple  sizes are multiples of this; null: of micro × data-parallel size
    micro_max a micro-batch doubles up to this size while every rank still has two or more; null: it stays at micro
    """

    _target_: str = MISSING
    name: str = MISSING
    samples: int | str = 32
    micro: int = 8
    micro_max: int | None = None
    max: int = MISSING
    eta: float = 0.2
    interval: int = 1
    ema: float = 0.0
    growth: float | None = 2.0
    shrink: bool = False
    multiple: int | None = None


@dataclass
class NormTestConfig(AdaptiveConfig):
    """Gradient noise at most eta × the gradient's norm; unbiased, literal: see adaptive.py. The recipe says more."""

    _target_: str = "meshloom.optim.batch.adaptive.NormTest"
    name: str = "norm_test"
    unbiased: bool = False
    literal: bool = False


@dataclass
class InnerProductConfig(AdaptiveConfig):
    """Gradient noise along the gradient at most eta × its norm."""

    _target_: str = "meshloom.optim.batch.adaptive.InnerProduct"
    name: str = "inner_product"
    eta: float = 0.5


@dataclass
class AugmentedConfig(InnerProductConfig):
    """Noise along the gradient at most eta ×, and across it at most nu × the gradient's norm."""

    _target_: str = "meshloom.optim.batch.adaptive.Augmented"
    name: str = "augmented"
    nu: float = 1.0


@dataclass
class NoiseScaleConfig(AdaptiveConfig):
    """eta × the gradient noise scale."""

    _target_: str = "meshloom.optim.batch.adaptive.NoiseScale"
    name: str = "noise_scale"
    eta: float = 1.0
    interval: int = 10
    ema: float = 0.95
    growth: float | None = 1.25


@dataclass
class CriticalLossConfig(AdaptiveConfig):
    """eta × the critical batch of the loss, tokens / loss^(1 / alpha)."""

    _target_: str = "meshloom.optim.batch.adaptive.CriticalLoss"
    name: str = "critical_loss"
    eta: float = 1.0
    interval: int = 10
    ema: float = 0.95
    growth: float | None = 1.25
    tokens: float = 2.1e8
    alpha: float = 0.21


def register(store: ConfigStore) -> None:
    """Make the schemas known to Hydra as batch/base_<name>; the recipes of the group extend them."""
    for schema in (
        BatchConfig,
        StagesConfig,
        RampConfig,
        NormTestConfig,
        InnerProductConfig,
        AugmentedConfig,
        NoiseScaleConfig,
        CriticalLossConfig,
    ):
        store.store(group="batch", name=f"base_{schema.name}", node=schema)
