"""AdamW's whole update of a tensor in one pass over memory: clip, moments, decay, weight, and the weight in low precision.

Per element it reads weight, gradient and both moments and writes three of them and the copy: 28 bytes with a bf16 gradient
and copy. torch's fused AdamW moves as many, but needs the gradient clipped and in fp32 before and the weight cast after.
A weight of which bf16 numbers are kept is read, updated in fp32 and rounded in the same pass: 22 bytes, or 26 with remainders.

Imported only where Triton is at hand.
"""

# Triton comes with CUDA builds of torch only, and type checkers can't see through its decorator.
# pyright: reportMissingImports=false, reportUntypedFunctionDecorator=false
# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportIndexIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .rounding import KeptWeight
from .triton_rounding import HeldWeight, load_weight, store_weight

_BLOCK = 1024


@triton.jit(do_not_specialize=["key", "first_index"])
def _adamw(
    weight,
    other,
    gradient,
    first,
    second,
    scale,
    skip,
    size,
    key,
    first_index,
    length,
    stride,
    keep,
    rate_first,
    rate_second,
    step_size,
    root_correction,
    eps,
    SCALED: tl.constexpr,
    HELD: tl.constexpr,
    ROWS: tl.constexpr,
    SKIPPABLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    if SKIPPABLE:
        inside = inside & (tl.load(skip) == 0)  # a skipped update reads and writes nothing
    g = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
    if SCALED:
        g *= tl.load(scale)
    m = tl.load(first + at, mask=inside, other=0.0)
    v = tl.load(second + at, mask=inside, other=0.0)
    w = load_weight(weight, other, at, inside, HELD)
    m += (g - m) * rate_first
    v += (g * g - v) * rate_second
    w = w * keep - step_size * tl.div_rn(m, tl.sqrt_rn(v) * root_correction + eps)
    tl.store(first + at, m, mask=inside)
    tl.store(second + at, v, mask=inside)
    store_weight(w, weight, other, at, inside, key, first_index, length, stride, HELD, ROWS)


def adamw_update(
    weight: torch.Tensor,
    gradient: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    copy: torch.Tensor | None,
    scale: torch.Tensor | None,
    skip: torch.Tensor | None = None,
    *,
    step: float,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    kept: KeptWeight | None = None,
) -> None:
    """One update in place. Tensors of one shape on one GPU, all but the gradient contiguous; weight and moments fp32.

    gradient, copy  of any floating type; the copy is overwritten by the new weight
    scale           one number on the device that the gradient is multiplied by; None: 1
    skip            one number on the device; where it is not 0, nothing is changed; None: 0
    step            number of this update, the first being 1
    kept            what is read and written in the place of weight and copy; weight then needs no memory
    """
    size = weight.numel()
    if size == 0:
        return
    gradient = gradient.contiguous()
    assert first.is_contiguous() and second.is_contiguous(), "elements are matched by their place in memory"
    beta_first, beta_second = betas
    held = HeldWeight.of(weight, copy, kept)
    _adamw[(triton.cdiv(size, _BLOCK),)](
        *(*held.place, gradient, first, second, first if scale is None else scale),
        *(first if skip is None else skip, size, *held.draw),
        *(1 - lr * weight_decay, 1 - beta_first, 1 - beta_second),
        *(lr / (1 - beta_first**step), (1 - beta_second**step) ** -0.5, eps),
        SCALED=scale is not None,
        **held.constants,
        SKIPPABLE=skip is not None,
        BLOCK=_BLOCK,
        num_warps=4,
    )
