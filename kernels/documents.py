"""The documents of a batch of packed rows, in the forms that attention needs.

Shape legend: B rows, S positions of a row, N documents of all rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Documents(NamedTuple):
    """The documents of B rows. Attention stays inside a document, and positions restart there.

    ids_BS           (B, S) int64: a document is a run of equal values in a row
    cu_seqlens       (N + 1,) int32, beside the ids: where each document begins in the rows laid end to end, and the last ends
    host_cu_seqlens  the same numbers on the host: whoever needs them there must not wait for the device
    part_cu_seqlens  of the part of the rows that this rank holds, beside the ids, where a ring of ranks shares them
    host_rings       1-D int64 on the host, where this rank has a row of its own whose first documents it shares with others:
                     what `parallel/context/ring_plan.py` plans from
    """

    ids_BS: torch.Tensor
    cu_seqlens: torch.Tensor
    host_cu_seqlens: torch.Tensor
    part_cu_seqlens: torch.Tensor | None = None
    host_rings: torch.Tensor | None = None

    @classmethod
    def of(cls, ids_BS: torch.Tensor) -> Documents:
        """Find the documents of rows on the host."""
        starts_BS = torch.ones_like(ids_BS, dtype=torch.bool)
        starts_BS[:, 1:] = ids_BS[:, 1:] != ids_BS[:, :-1]
        starts = starts_BS.flatten().nonzero().flatten().to(torch.int32)
        cu_seqlens = torch.cat((starts, torch.tensor([ids_BS.numel()], dtype=torch.int32)))
        return cls(ids_BS, cu_seqlens, cu_seqlens)

    def to(self, device: torch.device) -> Documents:
        """Copy to a device, without waiting where memory is pinned; what is for the host stays there."""
        ids_BS, cu_seqlens = (tensor.to(device, non_blocking=True) for tensor in (self.ids_BS, self.cu_seqlens))
        return self._replace(ids_BS=ids_BS, cu_seqlens=cu_seqlens)

    def pin(self) -> Documents:
        """Put what will be copied to a device into page-locked memory."""
        return self._replace(ids_BS=self.ids_BS.pin_memory(), cu_seqlens=self.cu_seqlens.pin_memory())

    def mark_dynamic(self) -> None:
        """Tell the compiler that the number of documents varies, lest it compile a second time for the next micro-batch.

        Nothing public does that: PyTorch's own documentation sends one to `torch._dynamo`, too.
        """
        from torch._dynamo import maybe_mark_dynamic  # late: seconds, which a run without a compiler spares

        for tensor in (self.cu_seqlens, self.host_cu_seqlens, self.part_cu_seqlens, self.host_rings):
            if tensor is not None:
                maybe_mark_dynamic(tensor, 0)

    def positions(self) -> torch.Tensor:
        """Return the distance of each position from the start of its document, (B, S) int64."""
        return positions(self.ids_BS)


def positions(ids_BS: torch.Tensor) -> torch.Tensor:
    """Return the distance of each position from the start of its run of equal ids, (B, S) int64."""
    index_S = torch.arange(ids_BS.shape[1], device=ids_BS.device)
    starts_BS = torch.zeros_like(ids_BS, dtype=torch.int64)
    starts_BS[:, 1:] = torch.where(ids_BS[:, 1:] != ids_BS[:, :-1], index_S[1:], 0)
    return index_S - starts_BS.cummax(dim=1).values
