"""Triton kernels of a block's parts: RMSNorm's backward pass with the sums around it, and interleaving of rows.

Imported only where Triton is at hand.
"""

# Triton comes with CUDA builds of torch only, and type checkers can't see through its decorator.
# pyright: reportMissingImports=false, reportUntypedFunctionDecorator=false
# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportIndexIssue=false

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

_AT_ONCE = 3  # gradients that one kernel sums: those of query, key and value
_PROGRAMS = 4  # for each multiprocessor: they keep a part of the weight's gradient each


@triton.jit
def _norm_backward(x, weight, residual, g0, g1, g2, dx, dweight, rows, width, eps, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    inside = at < width
    scale = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        here = tl.cast(row, tl.int64) * width + at
        value = tl.load(x + here, mask=inside, other=0.0).to(tl.float32)
        gradient = tl.load(g0 + here, mask=inside, other=0.0).to(tl.float32)
        if COUNT > 1:
            gradient += tl.load(g1 + here, mask=inside, other=0.0).to(tl.float32)
        if COUNT > 2:
            gradient += tl.load(g2 + here, mask=inside, other=0.0).to(tl.float32)
        rest = tl.load(residual + here, mask=inside, other=0.0).to(tl.float32)
        inverse = 1 / tl.sqrt(tl.sum(value * value, 0) / width + eps)
        unit = value * inverse
        total += gradient * unit
        gradient *= scale
        mean = tl.sum(gradient * unit, 0) / width
        tl.store(dx + here, ((gradient - unit * mean) * inverse + rest).to(dx.dtype.element_ty), mask=inside)
    tl.store(dweight + tl.program_id(0).to(tl.int64) * width + at, total, mask=inside)


def norm_backward_rows(
    x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor, gradients: Sequence[torch.Tensor], eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return gradients of x (…, width), plus `residual`, and weight for y = RMSNorm(x) · weight with the sum of `gradients`."""
    width = x.shape[-1]
    rows = x.numel() // width
    x, residual, *gradients = (tensor.contiguous() for tensor in (x, residual, *gradients))
    while len(gradients) > _AT_ONCE:
        gradients = [gradients[0] + gradients[1], *gradients[2:]]
    programs = min(rows, _PROGRAMS * torch.cuda.get_device_properties(x.device).multi_processor_count)
    dx, dweight = torch.empty_like(x), x.new_empty(programs, width, dtype=torch.float32)
    if rows:
        given = [gradients[min(at, len(gradients) - 1)] for at in range(_AT_ONCE)]
        _norm_backward[(programs,)](
            *(x, weight, residual, *given, dx, dweight, rows, width, eps),
            COUNT=len(gradients),
            BLOCK=triton.next_power_of_2(width),
            num_warps=8,
        )
    return dx, dweight.sum(0).to(weight.dtype)


@triton.jit
def _turns(a, b, both, width, APART: tl.constexpr, BLOCK: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    each, here = row * width + at, 2 * row * width + at
    if APART:
        tl.store(a + each, tl.load(both + here, mask=inside), mask=inside)
        tl.store(b + each, tl.load(both + here + width, mask=inside), mask=inside)
    else:
        tl.store(both + here, tl.load(a + each, mask=inside), mask=inside)
        tl.store(both + here + width, tl.load(b + each, mask=inside), mask=inside)


def _copy(a: torch.Tensor, b: torch.Tensor, both: torch.Tensor, *, apart: bool) -> None:
    rows, width = a.shape
    block = min(2048, triton.next_power_of_2(width))
    _turns[(rows, triton.cdiv(width, block))](a, b, both, width, APART=apart, BLOCK=block, num_warps=4)


def rows_in_turns(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Interleave rows: row 2i is a's row i, row 2i + 1 is b's; both (rows, width)."""
    both = a.new_empty(2 * a.shape[0], a.shape[1])
    _copy(a.contiguous(), b.contiguous(), both, apart=False)
    return both


def rows_apart(both: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Undo `rows_in_turns`."""
    a, b = (both.new_empty(both.shape[0] // 2, both.shape[1]) for _ in range(2))
    _copy(a, b, both.contiguous(), apart=True)
    return a, b
