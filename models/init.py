"""Initial weights, a function of (seed, parameter name, index) alone: rule R3.

Every element has its own random number: a counter-based generator (SplitMix64, Steele et al. 2014, doi
10.1145/2714064.2660195) hashes the element's position in the whole parameter. So a shard draws only its own elements,
on any device. The value does not depend on how the parameter is cut, or in which order parameters are filled.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import xxhash

_GOLDEN = 0x9E3779B97F4A7C15
_CHUNK = 1 << 22  # elements drawn at once: bounds the memory of the integer temporaries


@dataclass(frozen=True)
class Normal:
    """Independent normal numbers of mean 0, cut off at 6.7 standard deviations by the generator's resolution."""

    std: float


@dataclass(frozen=True)
class Filled:
    """The same number for every element."""

    value: float


Initial = Normal | Filled


def _signed(value: int) -> int:
    """Return the int64 with the same 64 bits."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Shift int64 bit patterns right logically (`>>` is arithmetic)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _splitmix64(state: torch.Tensor) -> torch.Tensor:
    """Apply SplitMix64's output function to an int64 tensor of states (already advanced by the golden gamma)."""
    z = (state ^ _shift_right(state, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift_right(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shift_right(z, 31)


def _normals(key: int, index: torch.Tensor) -> torch.Tensor:
    """Draw standard normal fp64 numbers for int64 element indices, by Box–Muller on the two halves of one hash."""
    bits = _splitmix64((index + 1) * _signed(_GOLDEN) + _signed(key))
    radius = (_shift_right(bits, 32).double() + 0.5) / 2**32
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
    if tensor.numel() == 0:
        return
    key = xxhash.xxh3_64_intdigest(f"{seed}/{name}".encode())
    device = on or tensor.device
    shape = tensor.shape if tensor.dim() else torch.Size([1])
    row = math.prod(shape[1:])
    rows_at_once = max(1, _CHUNK // max(1, row))
    flat = tensor.reshape(shape)
    for start in range(0, shape[0], rows_at_once):
        part = flat[start : start + rows_at_once]
        index = torch.zeros((1,) * len(shape), dtype=torch.int64, device=device)
        stride = 1
        for dim in reversed(range(tensor.dim())):
            first = offsets[dim] + (start if dim == 0 else 0)
            along = torch.arange(first, first + part.shape[dim], device=device, dtype=torch.int64) * stride
            index = index + along.view([-1 if d == dim else 1 for d in range(len(shape))])
            stride *= global_shape[dim]
        part.copy_(_normals(key, index) * rule.std)
