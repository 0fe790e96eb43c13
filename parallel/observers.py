"""Observers of a step's gradient: callbacks that engines call during accumulation, by this one protocol."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..data.assignment import Share
from ..optim.optimizers.parameters import ComparesHalves


class GradientObserver:
    """Callbacks of a step, in the order in which they are called. By default they do nothing."""

    def begin(self, share: Share, global_tokens: torch.Tensor) -> int | None:
        """Prepare for a step, before its first forward pass. share: this rank's, still on the host.

        Returns the number of its micro-batches after which to call `see_part`, the same on every rank; None: never.
        """
        return None

    def see_part(self, gradients: Sequence[torch.Tensor]) -> None:
        """Observe this rank's shards of the gradient so far, summed over all ranks. They will be changed in place."""

    def see_whole(self, gradients: Sequence[torch.Tensor]) -> None:
        """Observe this rank's shards of the step's gradient, before it is clipped."""


class HalvesObserver(GradientObserver):
    """Passes the gradient of a batch's first half to the optimizer, in steps for which the optimizer wants it."""

    def __init__(self, optimizer: ComparesHalves) -> None:
        self._optimizer = optimizer
        self._first_half: list[torch.Tensor] | None = None

    def begin(self, share: Share, global_tokens: torch.Tensor) -> int | None:
        """Ask for the gradient of the global batch's first half."""
        self._first_half = None
        if not self._optimizer.wants_halves:
            return None
        assert share.first_half, "halves need a batch dealt in halves, of two micro-batches or more"
        return share.first_half

    def see_part(self, gradients: Sequence[torch.Tensor]) -> None:
        """Keep a copy of the first half's gradient."""
        self._first_half = [gradient.clone() for gradient in gradients]

    def see_whole(self, gradients: Sequence[torch.Tensor]) -> None:
        """Have the optimizer compare the halves."""
        if self._first_half is not None:
            self._optimizer.observe_halves(self._first_half)
        self._first_half = None


def optimizer_observers(optimizer: torch.optim.Optimizer) -> list[GradientObserver]:
    """Return the observers that an optimizer needs."""
    return [HalvesObserver(optimizer)] if isinstance(optimizer, ComparesHalves) else []
