"""The optimizer as the engine drives it: its step, and its state as checkpoints see it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch

from ...kernels.rounding import KeptWeight
from ...optim.optimizers.parameters import AveragesWeights, FusedStep, MaskedStep, RoundedStep
from .strategy import LocalWeight


class Update:
    """An optimizer over a rank's weights.

    fused     whether its step scales gradients and writes compute copies on the way (`FusedStep`)
    masked    whether its step can be skipped on the device (`MaskedStep`)
    rounded   whether its step can update bf16 weights that have no masters (`RoundedStep`)
    averages  it, if it trains at other weights than those that are evaluated and saved (`AveragesWeights`)
    """

    def __init__(self, optimizer: torch.optim.Optimizer, weights: Mapping[str, LocalWeight]) -> None:
        self._optimizer, self._weights = optimizer, weights
        self.fused = isinstance(optimizer, FusedStep) and optimizer.fused_step
        self.masked = isinstance(optimizer, MaskedStep) and optimizer.masked_step
        self.rounded = isinstance(optimizer, RoundedStep) and optimizer.rounded_step
        self.averages = optimizer if isinstance(optimizer, AveragesWeights) else None

    @property
    def _fused_step(self) -> FusedStep:
        return cast(FusedStep, self._optimizer)

    def scale(self, gradients: list[torch.Tensor], factor: torch.Tensor) -> None:
        """Multiply the gradients by a number on the device, now or in the next step."""
        if self.fused:
            self._fused_step.gradient_scale = factor
        else:
            torch._foreach_mul_(gradients, factor)

    def step(self, lr: float, skip: torch.Tensor | None = None, kept: Mapping[torch.Tensor, KeptWeight] | None = None) -> None:
        """Take one optimizer step at this learning rate.

        skip: 1 on the device if the step is not to be taken; the host waits for it unless `masked`
        kept: what is updated in the place of weights; only if `rounded`
        """
        if skip is not None:
            if self.masked:
                cast(MaskedStep, self._optimizer).skip = skip
            elif skip.item():
                return
        if kept:
            cast(RoundedStep, self._optimizer).kept = kept
        for group in self._optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        self._optimizer.step()

    def forget(self, count: int) -> None:
        """Take the last `count` steps, all of them skipped, out of the optimizer's counts."""
        if self.masked:
            cast(MaskedStep, self._optimizer).forget_steps(count)

    def zero_grad(self) -> None:
        """Discard the gradients and their pending scale."""
        if self.fused:
            self._fused_step.gradient_scale = None
        for weight in self._weights.values():
            weight.tensor.grad = weight.placed.parameter.grad = None

    def counters(self) -> dict[str, float]:
        """Return the scalar state of the first parameter, which is that of every one."""
        state = self._optimizer.state[next(iter(self._weights.values())).tensor]
        return {role: float(value) for role, value in state.items() if not torch.is_tensor(value) or value.dim() == 0}

    @torch.no_grad()
    def load_counters(self, counters: Mapping[str, float]) -> None:
        """Set the scalar state of every parameter."""
        for weight in self._weights.values():
            state = self._optimizer.state[weight.tensor]
            for role, value in counters.items():
                if torch.is_tensor(state[role]):
                    state[role].fill_(value)
                else:
                    state[role] = type(state[role])(value)
