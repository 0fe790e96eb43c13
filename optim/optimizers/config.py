"""Config of `optim`: how a gradient becomes an update."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...config.keys import MISSING, Side, key, option, target

COUPLING = "how the learning rate follows a batch size that changes: none, sqrt, linear or sqrt_saturating"


@dataclass
class OptimConfig:
    """What every optimizer has.

    HALVES  whether it compares halves of a batch, and so depends on how the batch is cut into micro-batches
    """

    SIDE: ClassVar[Side] = Side.RECIPE
    HALVES: ClassVar[bool] = False

    _target_: str = target(MISSING)
    name: str = option(MISSING)
    lr: int | float | str = key(3e-4, "peak learning rate (`schedule` moves it), or auto:step_law")
    weight_decay: float = key(0.1, "of matrices; norms, biases and embeddings have none")
    lr_coupling: str = key("none", COUPLING)


@dataclass
class AdamWConfig(OptimConfig):
    """Adam with decoupled weight decay (arXiv 1711.05101), with the betas that language models are trained with."""

    _target_: str = target("meshloom.optim.optimizers.adamw.AdamW")
    name: str = option("adamw")
    betas: list[float] = key([0.9, 0.95], "weights of the past in the two moments")
    eps: float = key(1e-8, "added to the root of the second moment")
    fused: bool | None = key(None, "one kernel for the whole update; null: where the device has it", Side.PLACEMENT)


@dataclass
class AGVMConfig(AdamWConfig):
    """AdamW with a learning rate per kind of module, for large batches: see agvm.py."""

    HALVES: ClassVar[bool] = True

    _target_: str = target("meshloom.optim.optimizers.agvm.AGVM")
    name: str = option("agvm")
    interval: int = key(10, "steps between measurements; the paper's code takes 10, and 5 for batches beyond a thousand")
    begin: int = key(0, "first step that is measured: the warm-up's end")
    anchor: str = key("attention", "the kind of module whose disagreement is the measure")
    smoothing: float = key(0.97, "weight of the past in a module's rate")
    modules: dict[str, str] = key({}, "kind of module → pattern in parameter names; none: the kinds listed in agvm.py")


@dataclass
class LAMBConfig(OptimConfig):
    """Layer-wise trust ratios over Adam, for large batches (arXiv 1904.00962)."""

    _target_: str = target("meshloom.optim.optimizers.layerwise.LAMB")
    name: str = option("lamb")
    lr: int | float | str = key(2e-3, "peak learning rate (`schedule` moves it), or auto:step_law")
    weight_decay: float = key(0.01, "of matrices; norms, biases and embeddings have none")
    betas: list[float] = key([0.9, 0.999], "weights of the past in the two moments")
    eps: float = key(1e-6, "added to the root of the second moment")
    bias_correction: bool = key(True, "divide the moments by how much of them is known so far")
    norm_max: float | None = key(None, "a matrix's norm counts at most this much in its trust ratio; null: as it is")


@dataclass
class LARSConfig(OptimConfig):
    """Layer-wise trust ratios over momentum SGD, for large batches (arXiv 1708.03888)."""

    _target_: str = target("meshloom.optim.optimizers.layerwise.LARS")
    name: str = option("lars")
    lr: int | float | str = key(1.0, "peak learning rate (`schedule` moves it), or auto:step_law")
    weight_decay: float = key(1e-4, "of matrices; norms, biases and embeddings have none")
    momentum: float = key(0.9, "weight of the past in the update")
    trust: float = key(1e-3, "size of a step relative to a matrix's norm")


@dataclass
class AdaGradConfig(OptimConfig):
    """AdaGrad; with batch=norm_test this is AdAdaGrad (arXiv 2402.11215)."""

    _target_: str = target("meshloom.optim.optimizers.adagrad.AdaGrad")
    name: str = option("adagrad")
    lr: int | float | str = key(1e-2, "peak learning rate (`schedule` moves it), or auto:step_law")
    weight_decay: float = key(0.0, "of matrices; norms, biases and embeddings have none")
    eps: float = key(1e-10, "added to the root of the sum of squares")
    initial: float = key(1e-2, "what the sum of squares starts from")


@dataclass
class AdaGradNormConfig(OptimConfig):
    """AdaGrad-Norm; with batch=norm_test this is AdAdaGrad-Norm (arXiv 2402.11215)."""

    _target_: str = target("meshloom.optim.optimizers.adagrad.AdaGradNorm")
    name: str = option("adagrad_norm")
    lr: int | float | str = key(1.0, "peak learning rate (`schedule` moves it), or auto:step_law")
    weight_decay: float = key(0.0, "of matrices; norms, biases and embeddings have none")
    initial: float = key(1e-2, "what the sum of squares starts from")


OPTIONS: tuple[type, ...] = (AdamWConfig, AGVMConfig, LAMBConfig, LARSConfig, AdaGradConfig, AdaGradNormConfig)
"""Schemas of the group, known to Hydra as optim/base_<name>; the recipes of the group extend them."""
