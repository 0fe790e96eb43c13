"""Rows of gradients added up, and weights cast into where they are sent from: by our own kernels where Triton is at hand."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import cache

import torch

_NARROW = (torch.bfloat16, torch.float16, torch.float32)


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def sum_rows(rows: torch.Tensor, dtype: torch.dtype, out: torch.Tensor | None = None) -> torch.Tensor:
    """The sum (size,) of rows (count, size), contiguous, each widened to `dtype` before; `out` is written where it is given.

    On a GPU with Triton fp32 sums are ((row 0 + row 1) + row 2) + …, and so depend on nothing but the rows in this order: those
    of ranks 0, 1, 2, …. Elsewhere the order is PyTorch's. Two rows have one sum in any.
    """
    if rows.is_cuda and dtype == torch.float32 and rows.dtype in _NARROW and _has_triton():
        from .row_kernels import add_rows

        total = rows.new_empty(rows.shape[1], dtype=dtype) if out is None else out
        add_rows(rows, total)
        return total
    return torch.sum(rows, 0, dtype=dtype) if out is None else torch.sum(rows, 0, dtype=dtype, out=out)


def pack(places: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    """Write each source to its place, in the place's dtype. All contiguous, of equal sizes pair by pair."""
    if all(tensor.is_cuda and tensor.dtype in _NARROW for tensor in (*places, *sources)) and _has_triton():
        from .row_kernels import cast_into

        for place, source in zip(places, sources, strict=True):
            cast_into(place, source)
    else:
        torch._foreach_copy_(list(places), list(sources))
