"""Round fp32 weights to bf16 in one pass over memory: by chance, or into two numbers. The formulas are those of `rounding.py`.

PyTorch's own operations draw the bits in twenty passes over int64 arrays. Kernels of optimizers read and write weights by
`load_weight` and `store_weight`. A weight is held in one of four ways:

plain   in fp32
copied  in fp32, and written in a lower precision, too
chance  in bf16, rounded by chance
sum     as the sum of two bf16 numbers

Imported only where Triton is at hand.
"""

# Triton comes with CUDA builds of torch only, and type checkers can't see through its decorator.
# pyright: reportMissingImports=false, reportUntypedFunctionDecorator=false
# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportIndexIssue=false

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from .random_bits import BoxIndex, signed64
from .rounding import KeptWeight

_BLOCK = 1024


@triton.jit
def random_bits(index, key):
    """`random_bits.random_bits` of int64 indices, as uint64."""
    state = (index + 1).to(tl.uint64) * 0x9E3779B97F4A7C15 + key.to(tl.uint64)
    z = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def index_in_whole(at, first, length, stride, ROWS: tl.constexpr):
    """Return the index in the whole array of an element of a box: see `BoxIndex`. ROWS: the box has more than one row."""
    if ROWS:
        return first + at // length * stride + at % length
    return first + at


@triton.jit
def round_by_chance(values, drawn):
    """Round fp32 values to bf16, up where the lower 16 bits and 16 drawn ones carry."""
    bits = values.to(tl.int32, bitcast=True)
    rounded = (bits + (drawn & 0xFFFF).to(tl.int32)) & -65536
    finite = (bits & 0x7F800000) != 0x7F800000
    return tl.where(finite, rounded.to(tl.float32, bitcast=True), values).to(tl.bfloat16)


@triton.jit(do_not_specialize=["key", "first"])
def _round(values, out, size, key, first, length, stride, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    drawn = random_bits(index_in_whole(at, first, length, stride, ROWS), key)
    tl.store(out + at, round_by_chance(tl.load(values + at, mask=inside, other=0.0), drawn), mask=inside)


@triton.jit
def _split(values, high, low, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    whole = tl.load(values + at, mask=inside, other=0.0)
    nearest = whole.to(tl.bfloat16)
    tl.store(high + at, nearest, mask=inside)
    tl.store(low + at, (whole - nearest.to(tl.float32)).to(tl.bfloat16), mask=inside)


@triton.jit
def load_weight(weight, other, at, inside, HELD: tl.constexpr):
    """Read weights as fp32. other: the remainders, where there are any."""
    w = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    if HELD == "sum":
        w += tl.load(other + at, mask=inside, other=0.0).to(tl.float32)
    return w


@triton.jit
def store_weight(w, weight, other, at, inside, key, first, length, stride, HELD: tl.constexpr, ROWS: tl.constexpr):
    """Write fp32 weights as they are held. other: the remainders, or copies in a lower precision, where there are any."""
    if HELD == "chance":
        tl.store(
            weight + at, round_by_chance(w, random_bits(index_in_whole(at, first, length, stride, ROWS), key)), mask=inside
        )
    elif HELD == "sum":
        nearest = w.to(tl.bfloat16)
        tl.store(weight + at, nearest, mask=inside)
        tl.store(other + at, (w - nearest.to(tl.float32)).to(tl.bfloat16), mask=inside)
    else:
        tl.store(weight + at, w, mask=inside)
        if HELD == "copied":
            tl.store(other + at, w.to(other.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class HeldWeight:
    """Arguments of `load_weight` and `store_weight`.

    place  (weight, other); draw  (key, first, length, stride)
    """

    place: tuple[torch.Tensor, torch.Tensor]
    draw: tuple[int, int, int, int]
    constants: dict[str, Any]

    @classmethod
    def of(cls, weight: torch.Tensor, copy: torch.Tensor | None, kept: KeptWeight | None) -> HeldWeight:
        """Describe an fp32 weight and its copy, if any; or what is kept in its place."""
        if kept is None:
            assert weight.is_contiguous() and (copy is None or copy.is_contiguous()), "elements are matched by their place"
            held = "plain" if copy is None else "copied"
            return cls((weight, weight if copy is None else copy), (0, 0, 0, 0), {"HELD": held, "ROWS": False})
        assert kept.value.dtype == torch.bfloat16 and kept.value.is_contiguous(), (
            "what is kept has fewer bits than what is computed"
        )
        if kept.remainder is not None:
            assert kept.remainder.is_contiguous(), "elements are matched by their place"
            return cls((kept.value, kept.remainder), (0, 0, 0, 0), {"HELD": "sum", "ROWS": False})
        draw = signed64(kept.key), kept.box.first, kept.box.length, kept.box.stride
        rows = kept.box.length < kept.value.numel()
        return cls((kept.value, kept.value), draw, {"HELD": "chance", "ROWS": rows})


def round_box(values: torch.Tensor, out: torch.Tensor, key: int, box: BoxIndex) -> None:
    """Round fp32 values to bf16 by chance, drawn by (key, index in the whole array). Of one shape, contiguous, on one GPU."""
    assert values.is_contiguous() and out.is_contiguous(), "elements are matched by their place in memory"
    size = values.numel()
    if size:
        where = box.first, box.length, box.stride
        rows = box.length < size
        _round[(triton.cdiv(size, _BLOCK),)](values, out, size, signed64(key), *where, ROWS=rows, BLOCK=_BLOCK, num_warps=4)


def split_box(values: torch.Tensor, high: torch.Tensor, low: torch.Tensor) -> None:
    """Write fp32 values as sums of two bf16 numbers. Of one shape, contiguous, on one GPU."""
    assert values.is_contiguous() and high.is_contiguous() and low.is_contiguous(), "elements are matched by their place"
    size = values.numel()
    if size:
        _split[(triton.cdiv(size, _BLOCK),)](values, high, low, size, BLOCK=_BLOCK, num_warps=4)
