"""Config of `optim`: how a gradient becomes an update."""

from __future__ import annotations

from dataclasses import dataclass, field

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING


@dataclass
class OptimConfig:
    """What every optimizer has.

    lr            peak learning rate (`schedule` moves it), or auto:step_law
    weight_decay  of matrices; norms, biases and embeddings have none
    lr_coupling   how the learning rate follows a batch size that changes: none, sqrt, linear, sqrt_saturating
    """

    _target_: str = MISSING
    name: str = MISSING
    lr: int | float | str = 3e-4
    weight_decay: float = 0.1
    lr_coupling: str = "none"


@dataclass
class AdamWConfig(OptimConfig):
    """fused: one kernel for the whole update; null: where the device has it."""

    _target_: str = "meshloom.optim.optimizers.adamw.AdamW"
    name: str = "adamw"
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    fused: bool | None = None


@dataclass
class AGVMConfig(AdamWConfig):
    """AdamW with a learning rate per kind of module: see agvm.py. modules: none means the kinds listed there."""

    _target_: str = "meshloom.optim.optimizers.agvm.AGVM"
    name: str = "agvm"
    interval: int = 10
    begin: int = 0
    anchor: str = "attention"
    smoothing: float = 0.97
    modules: dict[str, str] = field(default_factory=dict[str, str])


@dataclass
class LAMBConfig(OptimConfig):
    """norm_max: a matrix's norm counts at most this much in its trust ratio; null: as it is."""

    _target_: str = "meshloom.optim.optimizers.layerwise.LAMB"
    name: str = "lamb"
    lr: int | float | str = 2e-3
    weight_decay: float = 0.01
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-6
    bias_correction: bool = True
    norm_max: float | None = None


@dataclass
class LARSConfig(OptimConfig):
    """trust: the size of a step relative to a matrix's norm."""

    _target_: str = "meshloom.optim.optimizers.layerwise.LARS"
    name: str = "lars"
    lr: int | float | str = 1.0
    weight_decay: float = 1e-4
    momentum: float = 0.9
    trust: float = 1e-3


@dataclass
class AdaGradConfig(OptimConfig):
    """initial: what the sum of squares starts from."""

    _target_: str = "meshloom.optim.optimizers.adagrad.AdaGrad"
    name: str = "adagrad"
    lr: int | float | str = 1e-2
    weight_decay: float = 0.0
    eps: float = 1e-10
    initial: float = 1e-2


@dataclass
class AdaGradNormConfig(OptimConfig):
    """initial: what the sum of squares starts from."""

    _target_: str = "meshloom.optim.optimizers.adagrad.AdaGradNorm"
    name: str = "adagrad_norm"
    lr: int | float | str = 1.0
    weight_decay: float = 0.0
    initial: float = 1e-2


def register(store: ConfigStore) -> None:
    """Make the schemas known to Hydra as optim/base_<name>; the recipes of the group extend them."""
    for schema in (AdamWConfig, AGVMConfig, LAMBConfig, LARSConfig, AdaGradConfig, AdaGradNormConfig):
        store.store(group="optim", name=f"base_{schema.name}", node=schema)
