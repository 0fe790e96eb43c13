"""Lion: steps of equal size, in the direction of a momentum's sign (Chen et al., arXiv 2302.06675)."""

# pyright: reportPrivateImportUsage=false
# torch does not export its operations on lists (_foreach_…), which its own optimizers use.

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from .config import LionConfig, base_rate
from .parameters import NamedParameter, Shards, decay_groups


class Lion(torch.optim.Optimizer):
    """u = sign(β₁·m + (1 − β₁)·g);  m ← β₂·m + (1 − β₂)·g;  w ← w − lr·(u + decay·w). Elementwise."""

    def __init__(self, config: LionConfig, parameters: Sequence[NamedParameter], shards: Shards) -> None:
        self._first, self._second = config.betas
        super().__init__(decay_groups(parameters, config.weight_decay), {"lr": base_rate(config)})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take one update."""
        assert closure is None
        for group in self.param_groups:
            weights: list[torch.Tensor] = [weight for weight in group["params"] if weight.grad is not None]
            if not weights:
                continue
            gradients = [weight.grad.to(weight.dtype) for weight in weights if weight.grad is not None]
            for weight in weights:
                if "momentum" not in self.state[weight]:
                    self.state[weight]["momentum"] = torch.zeros_like(weight)
            momenta = [self.state[weight]["momentum"] for weight in weights]
            updates = torch._foreach_lerp(gradients, momenta, self._first)
            torch._foreach_sign_(updates)
            torch._foreach_lerp_(momenta, gradients, 1 - self._second)
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(weights, updates, alpha=-group["lr"])
