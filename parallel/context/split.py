"""Context parallelism: every sample cut over the `cp` ranks, which find each other again inside attention.

    parallel.cp_kind  a rank holds                            attention
    ring              pieces of documents (`zigzag.py`)       keys or queries travel between ranks (`ring.py`)
    ulysses           one contiguous part                     heads are exchanged for positions (`ulysses.py`)

Everything but attention works on a rank's own positions, and the loss is a sum over tokens, so the ranks' losses and
gradients add up to the whole samples' (rule R2).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from ...data.batch import MicroBatch
from ...kernels.attention import CausalAttention
from ...kernels.attention_blocks import Kernel
from ...kernels.documents import Documents
from ..config import CONTEXT_KINDS
from ..mesh import Mesh
from .blocks import RingExchange
from .exchange import measure_waiting
from .ring import Ring, ring_attend, with_ring_part
from .ring_call import on_device
from .ring_plan import DIRECT
from .ulysses import ulysses_attend
from .zigzag import Piece, deal_pieces


@dataclass(frozen=True)
class ContextSlice:
    """A rank's part of a micro-batch: T = S / cp positions of each row.

    micro_batch   tokens and targets (B, T); documents still of the whole rows, for attention needs them
    positions_BT  int64: where each position lies in its document (its sample, without documents)
    """

    micro_batch: MicroBatch
    positions_BT: torch.Tensor


class ContextParallel:
    """Cuts micro-batches over the cp axis of a mesh, and is the attention that knows of it (`kernels.attention.Attend`)."""

    def __init__(
        self, mesh: Mesh, kind: str, kernel: Kernel = "cudnn", ring_direct: int = DIRECT, ring_exchange: RingExchange = "keys"
    ) -> None:
        """Every rank of the cp axis makes one at the same time: the first message needs all of them.

        kernel: what computes a rank's part; ring_direct: `parallel.ring_direct`; ring_exchange: `parallel.ring_exchange`.
        """
        assert kind in CONTEXT_KINDS, kind
        self._plain = CausalAttention(kernel)
        self._kind, self._size, self._index = kind, mesh.layout.cp, mesh.coordinates["cp"]
        self._group = mesh.group("cp")
        self._ring = Ring(
            tuple(dist.get_process_group_ranks(self._group)), self._index, self._group, ring_direct, ring_exchange
        )
        mesh.before_closing.append(measure_waiting(self._group, mesh.compute_time.ring_waiting))
        mesh.sum(torch.zeros((), device=mesh.device), "cp")

    def __call__(
        self,
        q_BTHD: torch.Tensor,
        k_BTKD: torch.Tensor,
        v_BTKD: torch.Tensor,
        documents: Documents | None = None,
        *,
        scale: float | None = None,
        window: int | None = None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Causal attention of this rank's positions over the whole samples; documents are those of the whole samples."""
        how: dict[str, Any] = {"scale": scale, "window": window, "softcap": softcap, "sinks": sinks}
        if self._kind == "ulysses":
            return ulysses_attend(q_BTHD, k_BTKD, v_BTKD, documents, group=self._group, attend=self._plain, **how)
        length = q_BTHD.shape[1] * self._size
        kernel = self._plain.kernel
        return ring_attend(q_BTHD, k_BTKD, v_BTKD, documents, length=length, ring=self._ring, kernel=kernel, **how)

    def with_kernel(self, kernel: Kernel) -> ContextParallel:
        """Return the same, computing with this kernel."""
        other = copy.copy(self)
        other._plain = CausalAttention(kernel)
        return other

    def cut(self, micro_batch: MicroBatch) -> ContextSlice:
        """Cut out this rank's part of a micro-batch that is on the device, where a copy of a part waits for nothing."""
        length = micro_batch.tokens_BS.shape[1]
        documents = micro_batch.documents
        if documents is None:
            positions_BS = torch.arange(length, device=micro_batch.tokens_BS.device).expand_as(micro_batch.tokens_BS)
        else:
            positions_BS = documents.positions()
        if self._kind == "ring":
            if documents is None:
                cut = _CutRows(deal_pieces((0, length), length, self._size)[self._index])
            else:
                cu_seqlens = tuple(documents.host_cu_seqlens.tolist())
                pieces = deal_pieces(cu_seqlens, length, self._size)[self._index]
                cut = _TakePieces(pieces, len(micro_batch.tokens_BS), micro_batch.tokens_BS.device)
                documents = with_ring_part(documents, self._size, self._index)
        else:
            share = length // self._size
            cut = _CutRows([Piece(0, self._index * share, share)])
        own = MicroBatch(cut(micro_batch.tokens_BS), cut(micro_batch.targets_BS), documents)
        return ContextSlice(own, cut(positions_BS))


class _CutRows:
    """Cuts the same positions out of every row."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self._pieces = pieces

    def __call__(self, x_BS: torch.Tensor) -> torch.Tensor:
        return torch.cat([x_BS[:, piece.start : piece.start + piece.length] for piece in self._pieces], dim=1)


class _TakePieces:
    """Takes pieces of rows laid end to end, equally many positions of each row."""

    def __init__(self, pieces: Sequence[Piece], rows: int, device: torch.device) -> None:
        starts, lengths = (torch.tensor([piece[at] for piece in pieces]) for at in (1, 2))
        before = lengths.cumsum(0) - lengths
        index = torch.arange(int(lengths.sum())) + (starts - before).repeat_interleave(lengths)
        self._index_BT = on_device(index.reshape(rows, -1), device)

    def __call__(self, x_BS: torch.Tensor) -> torch.Tensor:
        return x_BS.take(self._index_BT)
