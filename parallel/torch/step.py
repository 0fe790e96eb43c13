"""Step strategies: micro-batches one after another, or through a pipeline's stages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import nn

from ...data.batch import MicroBatch
from ..pipeline.run import Pipeline
from ..pipeline.tied_head import TiedHead
from .inputs import ModelInputs
from .weights import Weights


class StepStrategy(Protocol):
    """Forward and backward passes of a rank's micro-batches."""

    def accumulate(
        self,
        micro_batches: Sequence[MicroBatch],
        global_tokens: torch.Tensor,
        pauses: Sequence[int],
        pause: Callable[[], None],
    ) -> torch.Tensor:
        """Accumulate the gradients of the sum of token losses / global_tokens. Returns this rank's part of that sum.

        pauses: numbers of micro-batches after which the gradients so far must be complete, and `pause` is called. The last
        one's gradients are complete after `Weights.wait_reduce`.
        """
        ...

    def evaluate(self, micro_batches: Sequence[MicroBatch]) -> torch.Tensor:
        """Run forward only. Returns this rank's part of the sum of token losses."""
        ...


class Accumulation:
    """Gradient accumulation: micro-batches one after another, each forward and backward."""

    def __init__(self, module: nn.Module, inputs: ModelInputs, weights: Weights, device: torch.device) -> None:
        self._module, self._inputs, self._weights, self._device = module, inputs, weights, device

    def _forward(self, micro_batch: MicroBatch) -> torch.Tensor:
        part, positions_BS = self._inputs.part(micro_batch)
        routing = self._inputs.routing(part)  # a user's own module does not know the argument
        more = {} if routing is None else {"routing": routing}
        return self._module(part.tokens_BS, part.targets_BS, part.documents, positions_BS, **more)

    def accumulate(
        self,
        micro_batches: Sequence[MicroBatch],
        global_tokens: torch.Tensor,
        pauses: Sequence[int],
        pause: Callable[[], None],
    ) -> torch.Tensor:
        """See `StepStrategy`."""
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        for number, micro_batch in enumerate(micro_batches, start=1):
            self._weights.set_last_micro_batch(number in pauses or number == len(micro_batches))
            loss = self._forward(micro_batch)
            (loss / global_tokens).backward()
            total += loss.detach()
            if number in pauses:
                self._weights.wait_reduce()
                pause()
        return total

    def evaluate(self, micro_batches: Sequence[MicroBatch]) -> torch.Tensor:
        """See `StepStrategy`."""
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        for micro_batch in micro_batches:
            total += self._forward(micro_batch)
        return total


class PipelinedStep:
    """Micro-batches through the stages of a pipeline."""

    def __init__(self, pipeline: Pipeline, inputs: ModelInputs, tied: TiedHead | None) -> None:
        """tied: the head, where its weight is that of the embedding."""
        self._pipeline, self._inputs, self._tied = pipeline, inputs, tied

    def accumulate(
        self,
        micro_batches: Sequence[MicroBatch],
        global_tokens: torch.Tensor,
        pauses: Sequence[int],
        pause: Callable[[], None],
    ) -> torch.Tensor:
        """See `StepStrategy`; a pipeline does not pause."""
        assert not pauses, "a pipeline's gradients are complete at its end only"
        if self._tied is not None:
            self._tied.fetch()
        total = self._pipeline.accumulate([self._inputs.of_stages(batch) for batch in micro_batches], global_tokens)
        if self._tied is not None:
            self._tied.return_gradient()
        return total

    def evaluate(self, micro_batches: Sequence[MicroBatch]) -> torch.Tensor:
        """See `StepStrategy`."""
        if self._tied is not None:
            self._tied.fetch()
        return self._pipeline.evaluate([self._inputs.of_stages(batch) for batch in micro_batches])
