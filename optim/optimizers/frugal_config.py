"""Config of FRUGAL."""

from __future__ import annotations

from dataclasses import dataclass

from ...config.keys import key, option, target
from ...config.problems import Problem
from .bounds import COUNT, NOT_NEGATIVE, beta_problems, bound_problems
from .config import OptimConfig


@dataclass(frozen=True)
class FRUGALConfig(OptimConfig):
    """AdamW for some columns of a matrix at a time, the gradient's sign for the others (arXiv 2411.07837): see frugal.py."""

    _target_: str = target("meshloom.optim.optimizers.frugal.FRUGAL")
    name: str = option("frugal")
    lr: int | float | str = key(1e-3, "peak learning rate (`schedule` moves it), or auto:step_law")
    betas: list[float] = key([0.9, 0.999], "weights of the past in the two moments")
    eps: float = key(1e-8, "added to the root of the second moment")
    period: int = key(4, "of so many columns of a matrix, side by side, one has moments; 1: all")
    interval: int = key(200, "steps with the same columns")
    sign_scale: float = key(1.0, "rate of the columns without moments, relative to lr")
    seed: int = key(0, "of the choice of columns")

    def problems(self, key: str = "optim") -> list[Problem]:
        """Return what is wrong with the values."""
        found = [*super().problems(key), *beta_problems(key, self.betas)]
        found += bound_problems(key, NOT_NEGATIVE, eps=self.eps, sign_scale=self.sign_scale)
        return found + bound_problems(key, COUNT, period=self.period, interval=self.interval)
