"""Lion: steps of equal size, in the direction of a momentum's sign (Chen et al., arXiv 2302.06675)."""

# pyright: reportPrivateImportUsage=false
# torch does not export its operations on lists (_foreach_…), which its own optimizers use.

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .config import LionConfig
from .elementwise import ElementwiseOptimizer, Tensors
from .parameters import NamedParameter, Shards


class Lion(ElementwiseOptimizer):
    """u = sign(β₁·m + (1 − β₁)·g);  m ← β₂·m + (1 − β₂)·g;  w ← w − lr·(u + decay·w). Elementwise."""

    roles = ("momentum",)
    counted = False

    def __init__(self, config: LionConfig, parameters: Sequence[NamedParameter], shards: Shards) -> None:
        self._first, self._second = config.betas
        super().__init__(config, parameters)

    def update(self, group: dict[str, Any], weights: Tensors, gradients: Tensors, arrays: Sequence[Tensors]) -> None:
        """Update the weights of a group."""
        (momenta,) = arrays
        updates = torch._foreach_lerp(gradients, momenta, self._first)
        torch._foreach_sign_(updates)
        torch._foreach_lerp_(momenta, gradients, 1 - self._second)
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(weights, updates, alpha=-group["lr"])
