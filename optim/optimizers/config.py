"""Config of `optim`: the optimizer, its learning rate and its settings."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from ...config.keys import MISSING, Side, key, option, target
from ...config.nodes import Custom, import_object
from ...config.problems import Problem
from ..local.config import LocalConfig
from .bounds import COUNT, FRACTION, NOT_NEGATIVE, POSITIVE, beta_problems, bound_problems, choice_problems

AUTOMATIC = "auto:"
"""Prefix of a value that a law of scale decides (`trainer/automatic.py`)."""
COUPLINGS = ("none", "sqrt", "linear", "sqrt_saturating")
COUPLING = "how the learning rate follows a batch size that changes: none, sqrt, linear or sqrt_saturating"


@dataclass(frozen=True)
class OptimConfig:
    """Keys of every optimizer."""

    SIDE: ClassVar[Side] = Side.RECIPE

    _target_: str = target(MISSING)
    name: str = option(MISSING)
    lr: int | float | str = key(3e-4, "peak learning rate (`schedule` moves it), or auto:step_law")
    weight_decay: float = key(0.1, "of matrices; norms, biases and embeddings have none")
    lr_coupling: str = key("none", COUPLING)
    local: LocalConfig = field(default_factory=LocalConfig)

    def problems(self, key: str = "optim") -> list[Problem]:
        """Return what is wrong with the values."""
        found = [*_rate_problems(key, self.lr), *self.local.problems(f"{key}.local")]
        found += choice_problems(key, "lr_coupling", self.lr_coupling, COUPLINGS)
        return found + bound_problems(key, NOT_NEGATIVE, weight_decay=self.weight_decay)

    def compares_halves(self) -> bool:
        """Return whether the optimizer compares halves of a batch, and so depends on how that is cut into micro-batches."""
        return False


def _rate_problems(key: str, lr: float | str) -> Iterator[Problem]:
    if isinstance(lr, str):
        if not lr.startswith(AUTOMATIC):
            yield Problem(f"{key}.lr", f"'{lr}' is not a number", f"write one, or {AUTOMATIC}step_law")
    elif not math.isfinite(lr):
        yield Problem(f"{key}.lr", f"{lr} is not a learning rate", f"use a number, or {AUTOMATIC}step_law")
    elif lr <= 0:
        yield Problem(f"{key}.lr", f"a learning rate of {lr:g} trains nothing", "give a positive one")


def base_rate(config: OptimConfig) -> float:
    """Return `lr` as a number, after a law has decided it. The schedule sets the rate of each step."""
    assert not isinstance(config.lr, str), "a law decides optim.lr before an optimizer is built"
    return float(config.lr)


@dataclass(frozen=True)
class CustomOptim(OptimConfig, Custom):
    """An optimizer of the user's own. Only the keys that the trainer reads are typed."""

    def compares_halves(self) -> bool:
        """Return whether the class has AGVM's `observe_halves`."""
        try:
            return hasattr(import_object(self.path), "observe_halves")
        except ImportError:  # reported where the optimizer is built
            return False


@dataclass(frozen=True)
class AdamWConfig(OptimConfig):
    """Adam with decoupled weight decay (arXiv 1711.05101), with the betas that language models are trained with."""

    _target_: str = target("meshloom.optim.optimizers.adamw.AdamW")
    name: str = option("adamw")
    betas: list[float] = key([0.9, 0.95], "weights of the past in the two moments")
    eps: float = key(1e-8, "added to the root of the second moment")
    fused: bool | None = key(None, "one kernel for the whole update; null: where the device has it", Side.PLACEMENT)

    def problems(self, key: str = "optim") -> list[Problem]:
        """Return what is wrong with the values."""
        return [*super().problems(key), *beta_problems(key, self.betas), *bound_problems(key, NOT_NEGATIVE, eps=self.eps)]


MODULES = {
    "embedding": r"^embed",
    "head": r"^head",
    "attention": r"\.attention\.",
    "experts": r"\.experts?\.",
    "ffn": r"\.(ffn|feed_forward|mlp|moe)\.",
}
"""AGVM's kinds of modules, by patterns in their parameters' names: the first that matches, else OTHER."""
OTHER = "other"


@dataclass(frozen=True)
class AGVMConfig(AdamWConfig):
    """AdamW with a learning rate per kind of module, for large batches: see agvm.py."""

    _target_: str = target("meshloom.optim.optimizers.agvm.AGVM")
    name: str = option("agvm")
    interval: int = key(10, "steps between measurements; the paper's code takes 10, and 5 for batches beyond a thousand")
    begin: int = key(0, "first step that is measured: the warm-up's end")
    anchor: str = key("attention", "the kind of module whose disagreement is the measure")
    smoothing: float = key(0.97, "weight of the past in a module's rate")
    modules: dict[str, str] = key({}, "kind of module → pattern in parameter names; none: the kinds listed in agvm.py")

    def problems(self, key: str = "optim") -> list[Problem]:
        """Return what is wrong with the values."""
        found = [
            *super().problems(key),
            *bound_problems(key, COUNT, interval=self.interval),
            *bound_problems(key, NOT_NEGATIVE, begin=self.begin),
            *bound_problems(key, FRACTION, smoothing=self.smoothing),
        ]
        for name, written in self.modules.items():
            try:
                re.compile(written)
            except re.error as error:
                fix = "give a regular expression for parameters' names"
                found.append(Problem(f"{key}.modules.{name}", f"'{written}' is no pattern ({error})", fix))
        kinds = [*(self.modules or MODULES), OTHER]
        if self.anchor not in kinds:
            found.append(
                Problem(f"{key}.anchor", f"'{self.anchor}' is none of the modules", f"choose one of {', '.join(kinds)}")
            )
        return found

    def compares_halves(self) -> bool:
        """Return True: AGVM compares halves."""
        return True


@dataclass(frozen=True)
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

    def problems(self, key: str = "optim") -> list[Problem]:
        """Return what is wrong with the values."""
        largest = {} if self.norm_max is None else {"norm_max": self.norm_max}
        found = [*super().problems(key), *beta_problems(key, self.betas)]
        return found + bound_problems(key, POSITIVE, eps=self.eps, **largest)


@dataclass(frozen=True)
class LARSConfig(OptimConfig):
    """Layer-wise trust ratios over momentum SGD, for large batches (arXiv 1708.03888)."""

    _target_: str = target("meshloom.optim.optimizers.layerwise.LARS")
    name: str = option("lars")
    lr: int | float | str = key(1.0, "peak learning rate (`schedule` moves it), or auto:step_law")
    weight_decay: float = key(1e-4, "of matrices; norms, biases and embeddings have none")
    momentum: float = key(0.9, "weight of the past in the update")
    trust: float = key(1e-3, "size of a step relative to a matrix's norm")

    def problems(self, key: str = "optim") -> list[Problem]:
        """Return what is wrong with the values."""
        found = [*super().problems(key), *bound_problems(key, FRACTION, momentum=self.momentum)]
        return found + bound_problems(key, POSITIVE, trust=self.trust)


@dataclass(frozen=True)
class AdaGradConfig(OptimConfig):
    """AdaGrad; with batch=norm_test this is AdAdaGrad (arXiv 2402.11215)."""

    _target_: str = target("meshloom.optim.optimizers.adagrad.AdaGrad")
    name: str = option("adagrad")
    lr: int | float | str = key(1e-2, "peak learning rate (`schedule` moves it), or auto:step_law")
    weight_decay: float = key(0.0, "of matrices; norms, biases and embeddings have none")
    eps: float = key(1e-10, "added to the root of the sum of squares")
    initial: float = key(1e-2, "what the sum of squares starts from")

    def problems(self, key: str = "optim") -> list[Problem]:
        """Return what is wrong with the values."""
        return [*super().problems(key), *bound_problems(key, NOT_NEGATIVE, eps=self.eps, initial=self.initial)]


@dataclass(frozen=True)
class AdaGradNormConfig(OptimConfig):
    """AdaGrad-Norm; with batch=norm_test this is AdAdaGrad-Norm (arXiv 2402.11215)."""

    _target_: str = target("meshloom.optim.optimizers.adagrad.AdaGradNorm")
    name: str = option("adagrad_norm")
    lr: int | float | str = key(1.0, "peak learning rate (`schedule` moves it), or auto:step_law")
    weight_decay: float = key(0.0, "of matrices; norms, biases and embeddings have none")
    initial: float = key(1e-2, "what the sum of squares starts from")

    def problems(self, key: str = "optim") -> list[Problem]:
        """Return what is wrong with the values."""
        return [*super().problems(key), *bound_problems(key, POSITIVE, initial=self.initial)]


@dataclass(frozen=True)
class AdEMAMixConfig(OptimConfig):
    """AdamW with a second, slow average of gradients (arXiv 2409.03137): see ademamix.py."""

    _target_: str = target("meshloom.optim.optimizers.ademamix.AdEMAMix")
    name: str = option("ademamix")
    betas: list[float] = key([0.9, 0.999], "weights of the past in the two moments")
    beta3: float = key(0.9999, "weight of the past in the slow average")
    alpha: float = key(5.0, "weight of the slow average in a step; the fast one's is 1")
    rise: int | None = key(None, "steps over which alpha and beta3 rise, as long as the run in the paper; null: none")
    eps: float = key(1e-8, "added to the root of the second moment")

    def problems(self, key: str = "optim") -> list[Problem]:
        """Return what is wrong with the values."""
        rise = {} if self.rise is None else {"rise": self.rise}
        found = [*super().problems(key), *beta_problems(key, self.betas), *bound_problems(key, COUNT, **rise)]
        found += bound_problems(key, FRACTION, beta3=self.beta3)
        if self.rise is not None and not all(beta > 0 for beta in (*self.betas[:1], self.beta3)):
            found.append(Problem(f"{key}.rise", "weights of the past of 0 can't rise", "use null, or larger ones"))
        return found + bound_problems(key, NOT_NEGATIVE, eps=self.eps, alpha=self.alpha)


@dataclass(frozen=True)
class ScheduleFreeConfig(OptimConfig):
    """AdamW on an average of weights in place of a decaying rate (arXiv 2405.15682): see schedule_free.py."""

    _target_: str = target("meshloom.optim.optimizers.schedule_free.ScheduleFree")
    name: str = option("schedule_free")
    lr: int | float | str = key(2.5e-3, "peak learning rate (`schedule` moves it), or auto:step_law")
    betas: list[float] = key([0.9, 0.999], "share of the average in the weights trained at; weight of the past in the moment")
    eps: float = key(1e-8, "added to the root of the second moment")
    step_power: float = key(0.0, "a step counts in the average by its number to this power")

    def problems(self, key: str = "optim") -> list[Problem]:
        """Return what is wrong with the values."""
        found = [*super().problems(key), *beta_problems(key, self.betas)]
        return found + bound_problems(key, NOT_NEGATIVE, eps=self.eps, step_power=self.step_power)


@dataclass(frozen=True)
class LionConfig(OptimConfig):
    """The sign of a momentum (arXiv 2302.06675): see lion.py."""

    _target_: str = target("meshloom.optim.optimizers.lion.Lion")
    name: str = option("lion")
    lr: int | float | str = key(1e-4, "peak learning rate (`schedule` moves it), or auto:step_law")
    weight_decay: float = key(1.0, "of matrices; norms, biases and embeddings have none")
    betas: list[float] = key([0.9, 0.99], "weights of the past in the step and in the momentum")

    def problems(self, key: str = "optim") -> list[Problem]:
        """Return what is wrong with the values."""
        return [*super().problems(key), *beta_problems(key, self.betas)]
