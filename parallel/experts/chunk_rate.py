"""The coefficient of chunk sparsity over a run (BlockFFN, arXiv 2507.08771), followed on the device."""

from __future__ import annotations

import torch

from ...models.mixture.balance_config import BalanceConfig

LEAST_GROWTH = 1.025


class ChunkRate:
    """A coefficient that is constant at first, and then follows the objective: if that shrinks, so does its coefficient.

    state_4  steps so far, the coefficient over that of the config, the sum of the objective in this window of steps, and its
             mean in the last window, 0 before there is one; fp64
    """

    def __init__(self, config: BalanceConfig, device: torch.device) -> None:
        self._first, self._steady, self._every = config.chunk_sparsity, config.chunk_steady, config.chunk_adjust
        self.state_4 = torch.tensor([0.0, 1.0, 0.0, 0.0], dtype=torch.float64, device=device)

    @property
    def rate(self) -> torch.Tensor:
        """The coefficient, a scalar."""
        return self._first * self.state_4[1]

    @torch.no_grad()
    def observe(self, objective: torch.Tensor, taken: torch.Tensor | None = None) -> None:
        """Take the objective of a step, the same on all ranks, without waiting for the device.

        taken: 0 on the device if the step is skipped, whatever its objective; None: 1
        """
        step, factor, total, last = self.state_4.unbind()
        step, total = step + 1, total + objective
        if self._every:
            ends = step.remainder(self._every) == 0
            mean = total / self._every
            growth = mean / last
            growth = torch.where(growth > 1, growth.clamp(min=LEAST_GROWTH), growth)
            factor = torch.where(ends & (step > self._steady) & (last > 0), factor * growth, factor)
            total, last = torch.where(ends, 0.0, total), torch.where(ends, mean, last)
        found_4 = torch.stack([step, factor, total, last])
        self.state_4.copy_(found_4 if taken is None else torch.where(taken > 0, found_4, self.state_4))
