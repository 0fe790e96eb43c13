"""Initial weights, a function of (seed, parameter name, index) alone: rule R3.

Every element has its own random number, by its position in the whole parameter (`kernels/random_bits.py`). The value does not
depend on how the parameter is cut, or in which order parameters are filled.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import xxhash

from ..kernels.random_bits import indexed_rows, random_bits, shift_right


@dataclass(frozen=True)
class Normal:
    """Independent normal numbers of mean 0, cut off at 6.7 standard deviations by the generator's resolution."""

    std: float


@dataclass(frozen=True)
class Filled:
    """The same number for every element."""

    value: float


Initial = Normal | Filled


def _normals(key: int, index: torch.Tensor) -> torch.Tensor:
    """Draw standard normal fp64 numbers for int64 element indices, by Box–Muller on the two halves of one hash."""
    bits = random_bits(key, index)
    radius = (shift_right(bits, 32).double() + 0.5) / 2**32
    angle = (bits & 0xFFFFFFFF).double() / 2**32
    return torch.sqrt(-2 * torch.log(radius)) * torch.cos(2 * math.pi * angle)


@torch.no_grad()
def fill(
    tensor: torch.Tensor,
    rule: Initial,
    *,
    seed: int,
    name: str,
    global_shape: tuple[int, ...],
    offsets: tuple[int, ...],
    on: torch.device | None = None,
) -> None:
    """Fill a local box of a parameter with its initial values, in place.

    tensor lies at `offsets` in the parameter called `name` of shape `global_shape`. Values are computed in fp64, then
    rounded. on: the device that draws, if not the tensor's own (a GPU for weights offloaded to the host).
    """
    if isinstance(rule, Filled):
        tensor.fill_(rule.value)
        return
    key = xxhash.xxh3_64_intdigest(f"{seed}/{name}".encode())
    flat = tensor.reshape(tensor.shape if tensor.dim() else torch.Size([1]))
    for rows, index in indexed_rows(tuple(tensor.shape), global_shape, offsets, on or tensor.device):
        flat[rows].copy_(_normals(key, index) * rule.std)
