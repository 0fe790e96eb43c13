"""The pointwise parts of an update of whole matrices, each in one pass over memory: momentum before, decay and step after.

Between them a method like Newton–Schulz makes the update from what `momentum_update` writes. Per element, with an fp32
gradient and updates and copies in bf16, the first reads gradient and momentum and writes momentum and lookahead: 14 bytes. The
second reads update and weight and writes weight and copy: 12 bytes.

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


@triton.jit
def _momentum(
    momentum,
    gradient,
    lookahead,
    scale,
    skip,
    size,
    rate,
    NESTEROV: tl.constexpr,
    SCALED: tl.constexpr,
    SKIPPABLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    taken = inside
    if SKIPPABLE:
        taken = inside & (tl.load(skip) == 0)  # a skipped update reads nothing
    g = tl.load(gradient + at, mask=taken, other=0.0).to(tl.float32)
    if SCALED:
        g *= tl.load(scale)
    m = tl.load(momentum + at, mask=taken, other=0.0)
    m += (g - m) * rate
    tl.store(momentum + at, m, mask=taken)
    ahead = m + (g - m) * rate if NESTEROV else m
    ahead = tl.where(taken, ahead, 0.0)  # finite also where the scale of a skipped update is not
    tl.store(lookahead + at, ahead.to(lookahead.dtype.element_ty), mask=inside)


@triton.jit
def _step(
    weight,
    update,
    copy,
    skip,
    size,
    keep,
    rate,
    COPIED: tl.constexpr,
    SKIPPABLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    if SKIPPABLE:
        inside = inside & (tl.load(skip) == 0)  # a skipped update reads and writes nothing
    u = tl.load(update + at, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + at, mask=inside, other=0.0)
    w = w * keep - u * rate
    tl.store(weight + at, w, mask=inside)
    if COPIED:
        tl.store(copy + at, w.to(copy.dtype.element_ty), mask=inside)


def momentum_update(
    momentum: torch.Tensor,
    gradient: torch.Tensor,
    lookahead: torch.Tensor,
    scale: torch.Tensor | None = None,
    skip: torch.Tensor | None = None,
    *,
    beta: float,
    nesterov: bool,
) -> None:
    """Move a momentum in place, m ← β·m + (1 − β)·g, and write (1 − β)·g + β·m, or m without Nesterov's, into `lookahead`.

    Tensors of one shape on one GPU, all but the gradient contiguous; the momentum fp32.

    gradient, lookahead  of any floating type
    scale                one number on the device that the gradient is multiplied by; None: 1
    skip                 one number on the device; where it is not 0, the momentum stays and `lookahead` becomes 0; None: 0
    """
    size = momentum.numel()
    if size == 0:
        return
    gradient = gradient.contiguous()
    assert momentum.is_contiguous() and lookahead.is_contiguous(), "elements are matched by their place in memory"
    _momentum[(triton.cdiv(size, _BLOCK),)](
        *(momentum, gradient, lookahead, momentum if scale is None else scale, momentum if skip is None else skip),
        *(size, 1 - beta),
        NESTEROV=nesterov,
        SCALED=scale is not None,
        SKIPPABLE=skip is not None,
        BLOCK=_BLOCK,
        num_warps=4,
    )


def weight_update(
    weight: torch.Tensor,
    update: torch.Tensor,
    copy: torch.Tensor | None = None,
    skip: torch.Tensor | None = None,
    *,
    keep: float,
    rate: float,
) -> None:
    """Move a weight in place, w ← keep·w − rate·update. Tensors of one shape on one GPU, all but the update contiguous.

    weight        fp32
    update, copy  of any floating type; the copy is overwritten by the new weight
    skip          one number on the device; where it is not 0, nothing is changed; None: 0
    """
    size = weight.numel()
    if size == 0:
        return
    update = update.contiguous()
    assert weight.is_contiguous() and (copy is None or copy.is_contiguous()), "elements are matched by their place in memory"
    _step[(triton.cdiv(size, _BLOCK),)](
        *(weight, update, weight if copy is None else copy, weight if skip is None else skip, size, keep, rate),
        COPIED=copy is not None,
        SKIPPABLE=skip is not None,
        BLOCK=_BLOCK,
        num_warps=4,
    )
