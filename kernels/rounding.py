"""Round fp32 to bf16 without losing steps that are smaller than a bf16 number's spacing."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .loss import runs_triton
from .random_bits import BoxIndex, indexed_rows, random_bits

_LOW = 0xFFFF  # the bits of an fp32 number that bf16 has not


@dataclass(frozen=True)
class KeptWeight:
    """An fp32 weight as it is kept between updates.

    value      the weight rounded to bf16, contiguous
    remainder  what rounding has left, in bf16: the weight is the sum of both. None: it is rounded by chance
    key, box   of the random bits: `round_stochastic`'s key, and where the value lies in the whole weight
    """

    value: torch.Tensor
    remainder: torch.Tensor | None
    key: int
    box: BoxIndex


@torch.no_grad()
def round_stochastic(
    values: torch.Tensor, out: torch.Tensor, *, key: int, global_shape: tuple[int, ...], offsets: tuple[int, ...]
) -> None:
    """Round fp32 values to one of their two bf16 neighbours, up with a probability that makes the mean exact.

    What is added to an element's lower 16 bits is drawn by (key, position in the whole array), so it does not depend on
    how the array is cut. Values that bf16 has, and infinities and NaN, stay as they are. values: a box at `offsets` in an
    array of `global_shape`; out: of its shape. On a GPU with Triton it is one pass over memory, with the same bits.
    """
    shape = tuple(values.shape)
    box = BoxIndex.of(shape, global_shape, offsets)
    if box is not None and _in_one_pass(values, out):
        from .triton_rounding import round_box

        round_box(values, out, key, box)
        return
    flat, into = (each if shape else each.view(1) for each in (values, out))
    for rows, index in indexed_rows(shape, global_shape, offsets, values.device):
        part = flat[rows]
        bits = part.contiguous().view(torch.int32)
        drawn = (random_bits(key, index) & _LOW).to(torch.int32)
        rounded = ((bits + drawn) & ~_LOW).view(torch.float32)
        into[rows].copy_(torch.where(part.isfinite(), rounded, part))


@torch.no_grad()
def split_in_two(values: torch.Tensor, high: torch.Tensor, low: torch.Tensor) -> None:
    """Write fp32 values as sums of two bf16 numbers: the nearest one, and the nearest to what that leaves."""
    if _in_one_pass(values, high, low):
        from .triton_rounding import split_box

        split_box(values, high, low)
        return
    high.copy_(values)
    low.copy_(values - high.float())


def _in_one_pass(values: torch.Tensor, *outputs: torch.Tensor) -> bool:
    """Return whether our kernels compute it: where Triton runs, with contiguous fp32 values and bf16 outputs."""
    dtypes = values.dtype == torch.float32 and all(each.dtype == torch.bfloat16 for each in outputs)
    return dtypes and runs_triton(values) and all(each.is_contiguous() for each in (values, *outputs))
