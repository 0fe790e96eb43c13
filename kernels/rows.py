"""Sum rows of gradients, by a Triton kernel where it is installed, and copy weights to where they are sent from."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .loss import runs_triton


def sum_rows(rows: torch.Tensor, dtype: torch.dtype, out: torch.Tensor | None = None) -> torch.Tensor:
    """Sum contiguous rows (count, size) to (size,), each widened to `dtype` before. `out` is written where it is given.

    On a GPU with Triton fp32 sums are ((row 0 + row 1) + row 2) + …, and so depend on nothing but the rows in this order: those
    of ranks 0, 1, 2, …. Elsewhere the order is PyTorch's. Two rows have one sum in any.
    """
    if dtype == torch.float32 and runs_triton(rows):
        from .triton_rows import add_rows

        total = rows.new_empty(rows.shape[1], dtype=dtype) if out is None else out
        add_rows(rows, total)
        return total
    return torch.sum(rows, 0, dtype=dtype) if out is None else torch.sum(rows, 0, dtype=dtype, out=out)


def pack(places: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    """Write each source to its place, in the place's dtype. Of equal sizes pair by pair.

    One by one: PyTorch's copy of many tensors at once runs at three quarters of the speed where it casts.
    """
    for place, source in zip(places, sources, strict=True):
        place.copy_(source)
