"""Step strategies: micro-batches one after another, or through a pipeline's stages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import nn

from ...data.batch import MicroBatch
from ..heartbeat import Phase
from ..mesh import Mesh
from ..on_host import RowOffload
from ..pipeline.run import Pipeline
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

    def __init__(
        self, module: nn.Module, inputs: ModelInputs, weights: Weights, mesh: Mesh, offload: RowOffload | None = None
    ) -> None:
        """offload: keeps activations of rows on the host."""
        self._module, self._inputs, self._weights, self._offload = module, inputs, weights, offload
        self._device, self._heartbeat = mesh.device, mesh.heartbeat

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
            self._heartbeat.beat(Phase.FORWARD, number)
            if self._offload is not None:
                self._offload.begin_row(micro_batch.documents)
            loss = self._forward(micro_batch)
            self._weights.begin_backward(loss)
            self._heartbeat.beat(Phase.BACKWARD, number)
            (loss / global_tokens).backward()
            total += loss.detach()
            if number in pauses:
                self._heartbeat.beat(Phase.EXCHANGE, number)
                self._weights.wait_reduce()
                pause()
        return total

    def evaluate(self, micro_batches: Sequence[MicroBatch]) -> torch.Tensor:
        """See `StepStrategy`."""
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        # Mixtures run a pass without gradients inside a step, too.
        before = self._heartbeat.phase
        phase = Phase.EVALUATION if before is Phase.EVALUATION else Phase.FORWARD
        for number, micro_batch in enumerate(micro_batches, start=1):
            self._heartbeat.beat(phase, number)
            total += self._forward(micro_batch)
        if before is not phase:
            self._heartbeat.beat(before)  # a hook that evaluates goes on with its own work
        return total


class SharedWeights(Protocol):
    """Weights that several stages of a pipeline use. One of them owns them, and others have copies."""

    def fetch(self) -> None:
        """Bring the copies up to date, before a pass. Every rank must call it."""
        ...

    def return_gradient(self) -> None:
        """Add the copies' gradients to the owner's, and discard them. Every rank must call it."""
        ...


class PipelinedStep:
    """Micro-batches through the stages of a pipeline."""

    def __init__(self, pipeline: Pipeline, inputs: ModelInputs, shared: Sequence[SharedWeights]) -> None:
        self._pipeline, self._inputs, self._shared = pipeline, inputs, shared

    def accumulate(
        self,
        micro_batches: Sequence[MicroBatch],
        global_tokens: torch.Tensor,
        pauses: Sequence[int],
        pause: Callable[[], None],
    ) -> torch.Tensor:
        """See `StepStrategy`; a pipeline does not pause."""
        assert not pauses, "a pipeline's gradients are complete at its end only"
        for weights in self._shared:
            weights.fetch()
        total = self._pipeline.accumulate([self._inputs.of_stages(batch) for batch in micro_batches], global_tokens)
        for weights in self._shared:
            weights.return_gradient()
        return total

    def evaluate(self, micro_batches: Sequence[MicroBatch]) -> torch.Tensor:
        """See `StepStrategy`."""
        for weights in self._shared:
            weights.fetch()
        return self._pipeline.evaluate([self._inputs.of_stages(batch) for batch in micro_batches])
