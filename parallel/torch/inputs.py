"""What the model is called with for a micro-batch: this rank's part of it, on its device."""

from __future__ import annotations

import torch

from ...data.batch import MicroBatch
from ...kernels.attention import positions
from ..context.split import ContextParallel
from ..engine import send
from ..mesh import Mesh
from ..pipeline.run import StageInputs
from ..tensor.placements import stream_dim


class ModelInputs:
    """Cuts micro-batches for this rank."""

    def __init__(self, mesh: Mesh, context: ContextParallel | None, width: int, *, sequence_parallel: bool) -> None:
        """width: D of the hidden states; sequence_parallel: whether tensor-parallel ranks cut their positions."""
        self._mesh, self._context = mesh, context
        self._width = width
        self._slices_sequences = sequence_parallel and mesh.layout.tp > 1

    def part(self, micro_batch: MicroBatch) -> tuple[MicroBatch, torch.Tensor | None]:
        """This rank's part, and the positions where those can't be told from it."""
        micro_batch = send(micro_batch, self._mesh.device)
        if self._context is None:
            return micro_batch, None
        own = self._context.cut(micro_batch)
        return own.micro_batch, own.positions_BT

    def of_stages(self, micro_batch: MicroBatch) -> StageInputs:
        """What a pipeline's stages are called with."""
        micro_batch, positions_BS = self.part(micro_batch)
        documents = micro_batch.documents_BS
        shared = {} if documents is None else {"documents_BS": documents}
        batch, length = micro_batch.tokens_BS.shape
        if self._slices_sequences:
            # What passes between stages is a rank's slice, from whose length a stage can't tell the positions.
            if positions_BS is None:
                plain = torch.arange(length, device=self._mesh.device).expand(batch, length)
                positions_BS = plain if documents is None else positions(documents)
            if stream_dim(batch, length, self._mesh.layout.tp) == 0:
                batch //= self._mesh.layout.tp
            else:
                length //= self._mesh.layout.tp
        if positions_BS is not None:
            shared["positions_BS"] = positions_BS
        hidden = (batch, length, self._width)
        return StageInputs(micro_batch.tokens_BS, micro_batch.targets_BS, shared, hidden)
