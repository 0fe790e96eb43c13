"""Model inputs for a micro-batch: this rank's part of it, on its device."""

from __future__ import annotations

import torch

from ...data.batch import IGNORED, MicroBatch
from ...kernels.documents import Documents
from ...models.mixture.ledger import Routing
from ...models.protocol import Model
from ..context.split import ContextParallel
from ..experts.balance import ExpertBalance
from ..mesh import Mesh
from ..pipeline.run import StageInputs
from ..tensor.placements import stream_dim


class ModelInputs:
    """Cuts micro-batches for this rank."""

    def __init__(
        self,
        mesh: Mesh,
        context: ContextParallel | None,
        model: Model,
        balance: ExpertBalance | None,
        *,
        sequence_parallel: bool,
        compiled: bool,
    ) -> None:
        """balance: of the model's mixtures of experts, if it has any.

        sequence_parallel: whether tensor-parallel ranks cut their positions; compiled: whether blocks are.
        """
        self._balance = balance
        self._mesh, self._context, self._compiled = mesh, context, compiled
        self._width = 0 if model.decoder_config is None else model.decoder_config.stream_width
        self._slices_sequences = sequence_parallel and mesh.layout.tp > 1

    def part(self, micro_batch: MicroBatch) -> tuple[MicroBatch, torch.Tensor | None]:
        """Cut out this rank's part. Also returns the positions where the part alone does not give them."""
        micro_batch = micro_batch.to(self._mesh.device)
        positions_BS = micro_batch.positions_BS
        if self._context is not None:
            part = self._context.cut(micro_batch)
            micro_batch, positions_BS = part.micro_batch, part.positions_BT
        if self._compiled and micro_batch.documents is not None:
            micro_batch.documents.mark_dynamic()
        return micro_batch, positions_BS

    def routing(self, part: MicroBatch) -> Routing | None:
        """Return what mixtures charge for this rank's part of a micro-batch; None where nothing is charged or counted."""
        return None if self._balance is None else self._balance.routing(part.targets_BS != IGNORED)

    def of_stages(self, micro_batch: MicroBatch) -> StageInputs:
        """Return the inputs of a pipeline's stages."""
        micro_batch, positions_BS = self.part(micro_batch)
        documents = micro_batch.documents
        shared: dict[str, torch.Tensor | Documents | Routing] = {} if documents is None else {"documents": documents}
        batch, length = micro_batch.tokens_BS.shape
        if self._slices_sequences:
            # A stage receives only a rank's slice, whose length does not give the positions.
            if positions_BS is None:
                plain = torch.arange(length, device=self._mesh.device).expand(batch, length)
                positions_BS = plain if documents is None else documents.positions()
            if stream_dim(batch, length, self._mesh.layout.tp) == 0:
                batch //= self._mesh.layout.tp
            else:
                length //= self._mesh.layout.tp
        if positions_BS is not None:
            shared["positions_BS"] = positions_BS
        routing = self.routing(micro_batch)
        if routing is not None:
            shared["routing"] = routing
        hidden = (batch, length, self._width)
        return StageInputs(micro_batch.tokens_BS, micro_batch.targets_BS, shared, hidden)
