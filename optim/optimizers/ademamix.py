"""AdEMAMix: AdamW with a second average of gradients, of a much longer memory (Pagliardini et al., arXiv 2409.03137)."""

# pyright: reportPrivateImportUsage=false
# torch does not export its operations on lists (_foreach_…), which its own optimizers use.

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from .config import AdEMAMixConfig
from .elementwise import ElementwiseOptimizer, Tensors
from .parameters import NamedParameter, Shards


class AdEMAMix(ElementwiseOptimizer):
    """u = (m / (1 − β₁ᵗ) + α·s) / (√(v / (1 − β₂ᵗ)) + eps);  w ← w − lr·(u + decay·w). Elementwise.

    m and v are Adam's moments;  s ← β₃·s + (1 − β₃)·g is the slow average, without correction for bias

    Over the first `rise` steps α grows linearly from 0, and the half-life of s from that of m.
    """

    roles = ("exp_avg", "exp_avg_sq", "exp_avg_slow")
    masks = True

    def __init__(self, config: AdEMAMixConfig, parameters: Sequence[NamedParameter], shards: Shards) -> None:
        self._config = config
        super().__init__(config, parameters)

    def update(self, group: dict[str, Any], weights: Tensors, gradients: Tensors, arrays: Sequence[Tensors]) -> None:
        """Update the weights of a group."""
        (means, squares, slow), step, taken = arrays, self.updates_taken, self.taken(weights[0])
        first, second = self._config.betas
        alpha, third = self.mixture(step)
        for averages, kept in ((means, first), (slow, third), (squares, second)):
            torch._foreach_mul_(averages, 1 - (1 - kept) * taken)
        torch._foreach_add_(means, gradients, alpha=1 - first)
        torch._foreach_add_(slow, gradients, alpha=1 - third)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - second)
        sizes = torch._foreach_sqrt(squares)
        torch._foreach_div_(sizes, math.sqrt(1 - second**step))
        torch._foreach_add_(sizes, self._config.eps)
        updates = torch._foreach_div(means, 1 - first**step)
        torch._foreach_add_(updates, slow, alpha=alpha)
        torch._foreach_mul_(updates, taken)
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"] * taken)
        torch._foreach_addcdiv_(weights, updates, sizes, -group["lr"])

    def mixture(self, step: int) -> tuple[float, float]:
        """Return α and β₃ in a step, counted from 1."""
        alpha, third, rise = self._config.alpha, self._config.beta3, self._config.rise
        if rise is None or step >= rise:
            return alpha, third
        first, share = self._config.betas[0], step / rise
        # The reciprocal of log β is a half-life, and it grows linearly.
        grown = 1 / ((1 - share) / math.log(first) + share / math.log(third))
        return alpha * share, min(math.exp(grown), third)
