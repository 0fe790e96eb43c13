"""Softmax of a chunk's logits: its statistics, and the loss's gradient, which overwrites the logits.

Each program handles one row. It reads the row once for an online maximum and sum (arXiv 1805.02867). Then it reads it again,
backwards from its end, which is still in the L2 cache, and overwrites it.

Imported only where Triton is at hand.
"""

# Triton comes with CUDA builds of torch only, and type checkers can't see through its decorator.
# pyright: reportMissingImports=false, reportUntypedFunctionDecorator=false
# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportIndexIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl

_LANES, _WIDTH = 1024, 8  # columns at once: 16 bytes of bf16 for each of 1,024 threads
_LOG2E = tl.constexpr(1.4426950408889634)
_LEAST = tl.constexpr(-3.0e38)  # a running maximum to begin with that, unlike −∞, can be subtracted from itself


@triton.jit
def _tanh(x):
    return 2 * tl.sigmoid(2 * x) - 1


@triton.jit
def _softmax_row(
    logits,
    row_stride,
    targets,
    log_sums,
    picked,
    columns,
    first,
    ignored,
    softcap,
    z_loss,
    CAPPED: tl.constexpr,
    SUMS_GIVEN: tl.constexpr,
    DIFFERENTIATE: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    target = tl.load(targets + row)
    valid = target != ignored
    column = target - first
    at = tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    if SUMS_GIVEN:
        log_sum = tl.load(log_sums + row)
    else:
        inside = valid & (column >= 0) & (column < columns)
        chosen = tl.load(logits + column, mask=inside, other=-float("inf")).to(tl.float32)
        if CAPPED:
            chosen = tl.where(inside, softcap * _tanh(chosen / softcap), chosen)
        peak = tl.full((LANES,), _LEAST, tl.float32)
        total = tl.zeros((LANES,), tl.float32)
        for start in range(0, columns, LANES * WIDTH):
            x = tl.load(logits + start + at, mask=start + at < columns, other=-float("inf")).to(tl.float32)
            if CAPPED:
                x = tl.where(start + at < columns, softcap * _tanh(x / softcap), x)
            x *= _LOG2E
            higher = tl.maximum(peak, tl.max(x, 1))
            total = total * tl.exp2(peak - higher) + tl.sum(tl.exp2(x - higher[:, None]), 1)
            peak = higher
        highest = tl.max(peak, 0)
        log_sum = (highest + tl.log2(tl.sum(total * tl.exp2(peak - highest), 0))) / _LOG2E
        tl.store(log_sums + row, log_sum)
        tl.store(picked + row, chosen)
    if DIFFERENTIATE:
        weight = valid.to(tl.float32)
        more = 1 + 2 * z_loss * log_sum
        # Backwards: what was read last is what the cache still has.
        for block in range(tl.cdiv(columns, LANES * WIDTH) - 1, -1, -1):
            here = block * LANES * WIDTH + at
            x = tl.load(logits + here, mask=here < columns, other=0.0, eviction_policy="evict_first").to(tl.float32)
            slope = weight
            if CAPPED:
                bent = _tanh(x / softcap)
                x = softcap * bent
                slope = weight * (1 - bent * bent)
            softmax = tl.exp2((x - log_sum) * _LOG2E)
            gradient = (softmax * more - (here == column).to(tl.float32)) * slope
            tl.store(logits + here, gradient.to(logits.dtype.element_ty), mask=here < columns, eviction_policy="evict_first")


@triton.jit
def _scale(out, values, factor, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(values + at, mask=at < size).to(tl.float32) * tl.load(factor).to(tl.float32)
    tl.store(out + at, x.to(out.dtype.element_ty), mask=at < size)


def scaled(values: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """values (contiguous, not fp64) times a factor of one element, computed in fp32 and rounded to `dtype`, in one pass."""
    assert values.is_contiguous()
    out = torch.empty_like(values, dtype=dtype)
    if values.numel():
        _scale[(triton.cdiv(values.numel(), 1024),)](out, values, factor, values.numel(), BLOCK=1024, num_warps=4)
    return out


def softmax_rows(
    logits_CV: torch.Tensor,
    targets_C: torch.Tensor,
    first: int,
    ignored: int,
    *,
    softcap: float | None = None,
    z_loss: float = 0.0,
    log_sum_C: torch.Tensor | None = None,
    differentiate: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-sum-exp of each row and its logit in column target − first, −∞ where there is none; both fp32.

    logits_CV  half precision or fp32, rows contiguous; overwritten by the gradient, softmax − one-hot without softcap and
               z-loss (zero in ignored rows), if `differentiate`
    softcap, z_loss  as in `loss.LossRule`
    log_sum_C  the rows' log-sum-exps, where they are known already: then only the gradient is made, of these
    """
    rows, columns = logits_CV.shape
    assert logits_CV.stride(1) == 1 and targets_C.is_contiguous(), "a row's columns lie side by side"
    sums = logits_CV.new_empty(rows, dtype=torch.float32) if log_sum_C is None else log_sum_C.contiguous()
    picked = torch.empty_like(sums)
    if rows and columns:
        _softmax_row[(rows,)](
            *(logits_CV, logits_CV.stride(0), targets_C, sums, picked, columns, first, ignored, softcap or 1.0, z_loss),
            CAPPED=softcap is not None,
            SUMS_GIVEN=log_sum_C is not None,
            DIFFERENTIATE=differentiate,
            LANES=_LANES,
            WIDTH=_WIDTH,
            num_warps=_LANES // 32,
        )
    return sums, picked
