"""Schedule-free AdamW: an average of weights in place of a decaying rate (Defazio et al., arXiv 2405.15682)."""

# pyright: reportPrivateImportUsage=false
# torch does not export its operations on lists (_foreach_…), which its own optimizers use.

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from .config import ScheduleFreeConfig
from .elementwise import ElementwiseOptimizer, Tensors
from .parameters import NamedParameter, Shards


class ScheduleFree(ElementwiseOptimizer):
    """z ← z − lr·(g / (√v̂ + eps) + decay·y);  x ← (1 − c)·x + c·z;  y = β₁·x + (1 − β₁)·z. Elementwise.

    y  the weights, at which gradients are computed
    x  the averages: what is evaluated, saved, exported and generated with
    c  the step's share in the average: (number of the step)^`step_power` · (highest rate so far)², over the sum of all so far
    v  Adam's second moment, v̂ = v / (1 − β₂ᵗ)

    Kept are x and the distance d = z − x, which is zero at first. So y is a function of what is kept: an evaluation or
    a checkpoint between two steps changes no bit of the run.
    """

    roles = ("average", "distance", "exp_avg_sq")
    average_role = "average"

    def __init__(self, config: ScheduleFreeConfig, parameters: Sequence[NamedParameter], shards: Shards) -> None:
        self._config = config
        self._share = 0.0
        super().__init__(config, parameters)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Take one update."""
        held = [weight for group in self.param_groups for weight in group["params"]]
        for weight in held:
            if "average" not in self.state[weight]:
                self.state[weight]["average"] = weight.detach().clone()
        group, known = self.param_groups[0], self.state[held[0]]
        rate = max(known.get("highest_rate", 0.0), group["lr"] / group["lr_scale"])
        weight_of_step = (known.get("step", 0) + 1) ** self._config.step_power * rate**2
        total = known.get("weight_sum", 0.0) + weight_of_step
        self._share = weight_of_step / total if total else 0.0
        for weight in held:
            self.state[weight].update(highest_rate=rate, weight_sum=total)
        super().step(closure)

    def update(self, group: dict[str, Any], weights: Tensors, gradients: Tensors, arrays: Sequence[Tensors]) -> None:
        """Update the weights of a group, and their averages."""
        (averages, distances, squares), second = arrays, self._config.betas[1]
        torch._foreach_mul_(squares, second)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - second)
        sizes = torch._foreach_sqrt(squares)
        torch._foreach_div_(sizes, math.sqrt(1 - second**self.updates_taken))
        torch._foreach_add_(sizes, self._config.eps)
        torch._foreach_addcdiv_(distances, gradients, sizes, -group["lr"])
        torch._foreach_add_(distances, weights, alpha=-group["lr"] * group["weight_decay"])
        torch._foreach_add_(averages, distances, alpha=self._share)
        torch._foreach_mul_(distances, 1 - self._share)
        self._put(weights, 1 - self._config.betas[0])

    def _put(self, weights: Tensors, share: float) -> None:
        """Set weights to their averages, and this share of the distance to z."""
        if weights:
            torch._foreach_copy_(weights, [self.state[weight]["average"] for weight in weights])
            torch._foreach_add_(weights, [self.state[weight]["distance"] for weight in weights], alpha=share)

    @torch.no_grad()
    def hold_averages(self) -> None:
        """Put x into the weights: see `AveragesWeights`."""
        self._put(self._averaged(), 0.0)

    @torch.no_grad()
    def hold_training_weights(self) -> None:
        """Put y into the weights."""
        self._put(self._averaged(), 1 - self._config.betas[0])

    def _averaged(self) -> Tensors:
        """List the weights that have averages: none before the first step, where x and y are the weights themselves."""
        return [weight for weight, state in self.state.items() if self.average_role in state]
