"""Random bits for each element of an array, a function of a key and the element's position alone.

A counter-based generator (SplitMix64, Steele et al. 2014, doi 10.1145/2714064.2660195) hashes the position in the whole
array. So a shard draws only its own elements, on any device, and a value does not depend on how the array is cut.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

_GOLDEN = 0x9E3779B97F4A7C15
_CHUNK = 1 << 22  # elements drawn at once: bounds the memory of the integer temporaries


def random_bits(key: int, index: torch.Tensor) -> torch.Tensor:
    """Hash int64 element indices into int64 bit patterns, by SplitMix64's output function. key: of 64 bits."""
    state = (index + 1) * signed64(_GOLDEN) + signed64(key)
    z = (state ^ shift_right(state, 30)) * signed64(0xBF58476D1CE4E5B9)
    z = (z ^ shift_right(z, 27)) * signed64(0x94D049BB133111EB)
    return z ^ shift_right(z, 31)


def shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Shift int64 bit patterns right logically (`>>` is arithmetic)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def signed64(value: int) -> int:
    """Return the int64 with the same lower 64 bits."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def indexed_rows(
    shape: tuple[int, ...], global_shape: tuple[int, ...], offsets: tuple[int, ...], device: torch.device
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield slices of the rows of a box, and the indices in the whole array of their elements: int64, as the rows are shaped.

    The box has this shape and lies at `offsets` in an array of `global_shape`. A number counts as one row.
    """
    extents = shape or (1,)
    if not math.prod(extents):
        return
    rows_at_once = max(1, _CHUNK // max(1, math.prod(extents[1:])))
    for start in range(0, extents[0], rows_at_once):
        rows = slice(start, min(start + rows_at_once, extents[0]))
        index = torch.zeros((1,) * len(extents), dtype=torch.int64, device=device)
        stride = 1
        for dim in reversed(range(len(shape))):
            first, count = (offsets[0] + start, rows.stop - start) if dim == 0 else (offsets[dim], extents[dim])
            along = torch.arange(first, first + count, device=device, dtype=torch.int64) * stride
            index = index + along.view([-1 if d == dim else 1 for d in range(len(extents))])
            stride *= global_shape[dim]
        yield rows, index


@dataclass(frozen=True)
class BoxIndex:
    """Where a box lies in the whole array: its element i has the index first + i // length · stride + i % length.

    first   index of the box's first element
    length  elements of a row, which lie side by side in the whole array
    stride  elements of the whole array from the begin of one row to that of the next
    """

    first: int
    length: int
    stride: int

    @classmethod
    def of(cls, shape: tuple[int, ...], global_shape: tuple[int, ...], offsets: tuple[int, ...]) -> BoxIndex | None:
        """Return the index of a box of this shape at `offsets`; None where it is cut so that its rows are not evenly apart."""
        first, stride = 0, 1
        runs = [[1, 1]]  # [elements, distance] of each dim of the box, from the last; dims that are not cut join the one before
        for extent, whole, offset in reversed(list(zip(shape, global_shape, offsets, strict=True))):
            first += offset * stride
            count, distance = runs[-1]
            if extent != 1 and count * distance == stride:
                runs[-1][0] *= extent
            elif extent != 1:
                runs.append([extent, stride])
            stride *= whole
        if len(runs) > 2:
            return None
        return cls(first, runs[0][0], runs[1][1] if len(runs) == 2 else 0)
