"""Rows of gradients from several ranks added up, in one pass at memory speed: PyTorch's reduction takes twice as long, which is
not made for a leading dim of two.

Imported only where Triton is at hand.
"""

# Triton comes with torch's CUDA builds alone, and a checker does not see what its decorator makes of a function.
# pyright: reportMissingImports=false, reportUntypedFunctionDecorator=false
# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportIndexIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 1024
_UNROLLED = 8  # rows whose loads are all begun at once; beyond that a loop takes them


@triton.jit
def _sum(rows, total, size, COUNT: tl.constexpr, UNROLL: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    here = rows + at  # moved on row by row: a number of all rows' elements may need more than 32 bits
    summed = tl.load(here, mask=inside, other=0.0).to(tl.float32)
    if UNROLL:
        for _ in tl.static_range(1, COUNT):
            here += size
            summed += tl.load(here, mask=inside, other=0.0).to(tl.float32)
    else:
        for _ in range(1, COUNT):
            here += size
            summed += tl.load(here, mask=inside, other=0.0).to(tl.float32)
    tl.store(total + at, summed, mask=inside)


def add_rows(rows: torch.Tensor, total: torch.Tensor) -> None:
    """Write ((row 0 + row 1) + row 2) + … in fp32 to `total` (size,) fp32. rows: (count ≥ 1, size), bf16, fp16 or fp32.

    Both contiguous, on one GPU.
    """
    count, size = rows.shape
    assert rows.is_contiguous() and total.is_contiguous() and total.shape == (size,) and total.dtype == torch.float32
    if size:
        _sum[(triton.cdiv(size, _BLOCK),)](rows, total, size, COUNT=count, UNROLL=count <= _UNROLLED, BLOCK=_BLOCK, num_warps=4)
