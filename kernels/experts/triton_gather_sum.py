"""The Triton kernel of `gather_sum`: each row is read once, nothing but the result is written.

Imported only where Triton is at hand.
"""

# Triton comes with CUDA builds of torch only, and type checkers can't see through its decorator.
# pyright: reportMissingImports=false, reportUntypedFunctionDecorator=false
# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportIndexIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl

_WIDEST = 2048  # columns of one program


@triton.jit
def _gather_sum(rows, place, gates, out, width, COUNT: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    total = tl.zeros((BLOCK,), tl.float32)
    for choice in tl.static_range(COUNT):
        row = tl.load(place + token * COUNT + choice).to(tl.int64)
        value = tl.load(rows + row * width + at, mask=inside, other=0.0).to(tl.float32)
        total += value * tl.load(gates + token * COUNT + choice).to(tl.float32) if GATED else value
    tl.store(out + token * width + at, total.to(out.dtype.element_ty), mask=inside)


def gather_sum_rows(rows_ND: torch.Tensor, place_TK: torch.Tensor, gates_TK: torch.Tensor | None) -> torch.Tensor:
    """See `gather_sum`; for bf16, fp16 and fp32, on a GPU."""
    tokens, count = place_TK.shape
    width = rows_ND.shape[1]
    rows_ND, place_TK = rows_ND.contiguous(), place_TK.contiguous()
    out_TD = rows_ND.new_empty(tokens, width)
    gates = place_TK if gates_TK is None else gates_TK.contiguous()
    if tokens:
        block = min(_WIDEST, triton.next_power_of_2(width))
        grid = (tokens, triton.cdiv(width, block))
        _gather_sum[grid](
            rows_ND, place_TK, gates, out_TD, width, COUNT=count, GATED=gates_TK is not None, BLOCK=block, num_warps=8
        )
    return out_TD
