"""Sum rows of gradients from several ranks in one pass, at the speed of memory.

PyTorch's reduction takes twice as long: it is not made for a leading dim of two.

Imported only where Triton is at hand.
"""

# Triton comes with CUDA builds of torch only, and type checkers can't see through its decorator.
# pyright: reportMissingImports=false, reportUntypedFunctionDecorator=false
# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportIndexIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 1024
_UNROLLED = 8  # rows whose loads are all issued at once; more rows are summed in a loop


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
