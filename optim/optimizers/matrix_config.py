"""Config of the optimizers that update whole matrices of blocks."""

from __future__ import annotations

from dataclasses import dataclass

from ...config.keys import key, option, target
from ...config.problems import Problem
from .bounds import COUNT, FRACTION, NOT_NEGATIVE, POSITIVE, beta_problems, bound_problems, choice_problems
from .config import OptimConfig


@dataclass(frozen=True)
class MatrixOptimConfig(OptimConfig):
    """Keys of optimizers that update matrices of blocks as wholes, and all else by AdamW: see matrix.py."""

    adamw_lr: float | None = key(None, "peak rate of embeddings, head and vectors, which AdamW updates; null: lr")
    adamw_betas: list[float] = key([0.9, 0.95], "weights of the past in that AdamW's moments")
    adamw_eps: float = key(1e-8, "added to the root of that AdamW's second moment")

    def problems(self, key: str = "optim") -> list[Problem]:
        """Return what is wrong with the values."""
        found = [*super().problems(key), *beta_problems(key, self.adamw_betas, "adamw_betas")]
        rate = {} if self.adamw_lr is None else {"adamw_lr": self.adamw_lr}
        return [*found, *bound_problems(key, NOT_NEGATIVE, adamw_eps=self.adamw_eps), *bound_problems(key, POSITIVE, **rate)]


SCALES = ("match_rms_adamw", "original", "mup")


@dataclass(frozen=True)
class MuonConfig(MatrixOptimConfig):
    """Orthogonalised momentum for the matrices of blocks: see muon.py."""

    _target_: str = target("meshloom.optim.optimizers.muon.Muon")
    name: str = option("muon")
    momentum: float = key(0.95, "weight of the past in the momentum")
    nesterov: bool = key(True, "look ahead by one step of momentum")
    ns_steps: int = key(5, "Newton–Schulz iterations")
    scale: str = key("match_rms_adamw", "size of a step: match_rms_adamw (then lr and decay are as AdamW's), original or mup")
    per_head: bool = key(False, "orthogonalise the rows of each head, and of each part of a fused projection, by themselves")

    def problems(self, key: str = "optim") -> list[Problem]:
        """Return what is wrong with the values."""
        found = [*super().problems(key), *bound_problems(key, FRACTION, momentum=self.momentum)]
        found += bound_problems(key, COUNT, ns_steps=self.ns_steps)
        return found + choice_problems(key, "scale", self.scale, SCALES)


@dataclass(frozen=True)
class NorMuonConfig(MuonConfig):
    """Muon with a second moment for each row (arXiv 2510.05491): see muon.py."""

    _target_: str = target("meshloom.optim.optimizers.muon.NorMuon")
    name: str = option("normuon")
    beta2: float = key(0.95, "weight of the past in the rows' second moments")
    eps: float = key(1e-10, "added to the root of the rows' second moments")

    def problems(self, key: str = "optim") -> list[Problem]:
        """Return what is wrong with the values."""
        return [
            *super().problems(key),
            *bound_problems(key, FRACTION, beta2=self.beta2),
            *bound_problems(key, POSITIVE, eps=self.eps),
        ]


@dataclass(frozen=True)
class SOAPConfig(MatrixOptimConfig):
    """Adam in the eigenbasis of Shampoo's preconditioner (arXiv 2409.11321): see soap.py."""

    _target_: str = target("meshloom.optim.optimizers.soap.SOAP")
    name: str = option("soap")
    lr: int | float | str = key(3e-3, "peak learning rate (`schedule` moves it), or auto:step_law")
    weight_decay: float = key(0.01, "of matrices; norms, biases and embeddings have none")
    betas: list[float] = key([0.95, 0.95], "weights of the past in the two moments")
    shampoo_beta: float | None = key(None, "weight of the past in the preconditioner; null: the second of betas")
    eps: float = key(1e-8, "added to the root of the second moment")
    interval: int = key(10, "steps between turns of the eigenbasis")
    max_dim: int = key(10_000, "a longer side of a matrix is not rotated")
    damping: float = key(1e-4, "added to the preconditioner's diagonal, relative to its mean")

    def problems(self, key: str = "optim") -> list[Problem]:
        """Return what is wrong with the values."""
        past = {} if self.shampoo_beta is None else {"shampoo_beta": self.shampoo_beta}
        return [
            *super().problems(key),
            *beta_problems(key, self.betas),
            *bound_problems(key, FRACTION, **past),
            *bound_problems(key, POSITIVE, eps=self.eps),
            *bound_problems(key, NOT_NEGATIVE, damping=self.damping),
            *bound_problems(key, COUNT, interval=self.interval, max_dim=self.max_dim),
        ]


@dataclass(frozen=True)
class LowRankConfig(MatrixOptimConfig):
    """Keys of optimizers that keep moments of projected gradients: see low_rank.py."""

    betas: list[float] = key([0.9, 0.999], "weights of the past in the two moments")
    eps: float = key(1e-6, "added to the root of the second moment")
    rank: int = key(128, "rows of the projected gradient; at most a matrix's shorter side")
    interval: int = key(200, "steps with the same projection")

    def problems(self, key: str = "optim") -> list[Problem]:
        """Return what is wrong with the values."""
        return [
            *super().problems(key),
            *beta_problems(key, self.betas),
            *bound_problems(key, POSITIVE, eps=self.eps),
            *bound_problems(key, COUNT, rank=self.rank, interval=self.interval),
        ]


SCALINGS = ("channel", "tensor")


@dataclass(frozen=True)
class APOLLOConfig(LowRankConfig):
    """Gradients scaled as Adam would scale their random projections (arXiv 2412.05270): see low_rank.py."""

    _target_: str = target("meshloom.optim.optimizers.low_rank.APOLLO")
    name: str = option("apollo")
    lr: int | float | str = key(1e-2, "peak learning rate (`schedule` moves it), or auto:step_law")
    weight_decay: float = key(0.0, "of matrices; norms, biases and embeddings have none")
    rank: int = key(256, "rows of the projected gradient; at most a matrix's shorter side. 1 with scaling=tensor: APOLLO-Mini")
    scaling: str = key("channel", "what has a scale of its own: channel (of the longer side) or tensor")
    scale: float = key(1.0, "factor on the square of a step's size; 128 for APOLLO-Mini")
    growth: float = key(1.01, "by how much a step's norm may grow from one to the next")
    seed: int = key(0, "of the random projections")

    def problems(self, key: str = "optim") -> list[Problem]:
        """Return what is wrong with the values."""
        found = [*super().problems(key), *bound_problems(key, POSITIVE, scale=self.scale)]
        found += bound_problems(key, COUNT, growth=self.growth)
        return found + choice_problems(key, "scaling", self.scaling, SCALINGS)


@dataclass(frozen=True)
class GaLoreConfig(LowRankConfig):
    """Adam in the subspace of gradients' largest singular vectors (arXiv 2403.03507): see low_rank.py."""

    _target_: str = target("meshloom.optim.optimizers.low_rank.GaLore")
    name: str = option("galore")
    lr: int | float | str = key(1e-2, "peak learning rate (`schedule` moves it), or auto:step_law")
    weight_decay: float = key(0.0, "of matrices; norms, biases and embeddings have none")
    scale: float = key(0.25, "factor on a step")

    def problems(self, key: str = "optim") -> list[Problem]:
        """Return what is wrong with the values."""
        return [*super().problems(key), *bound_problems(key, POSITIVE, scale=self.scale)]


@dataclass(frozen=True)
class AdafactorConfig(MatrixOptimConfig):
    """Second moments of rows and columns in place of one per element (arXiv 1804.04235): see adafactor.py."""

    _target_: str = target("meshloom.optim.optimizers.adafactor.Adafactor")
    name: str = option("adafactor")
    lr: int | float | str = key(1e-2, "peak learning rate (`schedule` moves it), or auto:step_law")
    weight_decay: float = key(0.0, "of matrices; norms, biases and embeddings have none")
    decay_power: float = key(-0.8, "the second moments' weight of the present is (step)^this")
    clip: float = key(1.0, "root mean square of a step, at most")
    eps: float = key(1e-15, "least root of a second moment")

    def problems(self, key: str = "optim") -> list[Problem]:
        """Return what is wrong with the values."""
        found = [*super().problems(key), *bound_problems(key, POSITIVE, clip=self.clip, eps=self.eps)]
        if not -1 <= self.decay_power <= 0:
            found.append(Problem(f"{key}.decay_power", f"{self.decay_power:g} can't be used", "use a number in [-1, 0]"))
        return found


@dataclass(frozen=True)
class NaturalGaLoreConfig(GaLoreConfig):
    """GaLore on gradients multiplied by an inverse Fisher matrix (arXiv 2410.16029): see low_rank.py."""

    _target_: str = target("meshloom.optim.optimizers.low_rank.NaturalGaLore")
    name: str = option("natural_galore")
    history: int = key(20, "projected gradients from which the Fisher matrix is made, with the present one")
    fisher_damping: float = key(1e-3, "added to the Fisher matrix's diagonal")

    def problems(self, key: str = "optim") -> list[Problem]:
        """Return what is wrong with the values."""
        found = [*super().problems(key), *bound_problems(key, COUNT, history=self.history)]
        return found + bound_problems(key, POSITIVE, fisher_damping=self.fisher_damping)
