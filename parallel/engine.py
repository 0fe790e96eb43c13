"""Engine: the protocol between the training step and whatever shards, computes and updates the weights.

The trainer never asks which engine it has.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from ..data.batch import MicroBatch
from ..optim.statistics import GradientStatistics
from .fragment import Fragment
from .moments import Measure


@dataclass(frozen=True)
class StepLoss:
    """Loss of a global batch, the same on every rank, still on the device so that reading it is the caller's choice.

    total   sum of token losses; tokens: number of positions that carry loss; `mean` is rule R2's loss
    extras  sums over the global batch of what the model also reports (a load-balancing loss, for example)
    """

    total: torch.Tensor
    tokens: torch.Tensor
    extras: dict[str, torch.Tensor]

    @property
    def mean(self) -> torch.Tensor:
        """Token-weighted mean loss over the global batch."""
        return self.total / self.tokens


class Engine(Protocol):
    """Forward, backward, update and state of a model spread over a layout."""

    module: torch.nn.Module

    def accumulate(
        self, micro_batches: Sequence[MicroBatch], global_tokens: torch.Tensor, measure: Measure = Measure.NOTHING
    ) -> StepLoss:
        """Forward and backward of this rank's share; gradients of `total / global_tokens` are ready afterwards.

        global_tokens: valid positions of the whole global batch, a scalar on the device.
        measure: what `gradient_statistics` will be asked for.
        """
        ...

    def gradient_norm(self) -> torch.Tensor:
        """Euclidean norm of the whole gradient, every parameter counted once; the same on every rank."""
        ...

    def clip(self, max_norm: float, norm: torch.Tensor) -> None:
        """Scale the gradient by min(1, max_norm / (norm + 1e-6))."""
        ...

    def gradient_statistics(self, samples: int) -> GradientStatistics | None:
        """Statistics of the gradient just accumulated from a global batch of so many samples, before clipping.

        To be asked after `gradient_norm`, where `accumulate` was told to measure. None when they can't be estimated.
        """
        ...

    def update(self, lr: float) -> None:
        """One optimizer step at this learning rate."""
        ...

    def zero_grad(self) -> None:
        """Forget the gradient."""
        ...

    def evaluate(self, micro_batches: Sequence[MicroBatch]) -> StepLoss:
        """Loss without gradients. `tokens` is counted over all ranks here."""
        ...

    def fragments(self) -> Iterator[Fragment]:
        """This rank's boxes of the weights and of the optimizer's state, live: writing into them restores."""
        ...

    def prepare_restore(self) -> None:
        """Make every fragment exist that a checkpoint may hold, before the first update has made the optimizer's state."""
        ...

    def counters(self) -> dict[str, float]:
        """The optimizer's scalar state by name (Adam's step), uniform over parameters."""
        ...

    def load_counters(self, counters: dict[str, float]) -> None:
        """Put back what `counters` gave; called after the fragments have been restored."""
        ...
