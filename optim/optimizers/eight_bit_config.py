"""Config of AdamW with moments of 8 bits."""

from __future__ import annotations

from dataclasses import dataclass

from ...config.keys import key, option, target
from ...config.problems import Problem
from .bounds import COUNT, POSITIVE, beta_problems, bound_problems
from .config import OptimConfig

LARGEST_BLOCK = 8192  # elements that the kernel of the update can hold at once


@dataclass(frozen=True)
class AdamW8bitConfig(OptimConfig):
    """AdamW with moments of 8 bits, scaled by blocks (arXiv 2110.02861): see eight_bit.py."""

    _target_: str = target("meshloom.optim.optimizers.eight_bit.AdamW8bit")
    name: str = option("adamw_8bit")
    betas: list[float] = key([0.9, 0.95], "weights of the past in the two moments")
    eps: float = key(1e-8, "added to the root of the second moment")
    block: int = key(256, "elements of a row that share a scale")
    min_size: int = key(4096, "smaller weights, and vectors, keep whole moments")

    def problems(self, key: str = "optim") -> list[Problem]:
        """Return what is wrong with the values."""
        return [
            *super().problems(key),
            *beta_problems(key, self.betas),
            *bound_problems(key, POSITIVE, eps=self.eps),
            *bound_problems(key, COUNT, block=self.block, min_size=self.min_size),
        ]
