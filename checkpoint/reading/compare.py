"""Read whole arrays of finished checkpoints, and compare two checkpoints bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ...parallel.box import Box
from ..dtypes import as_tensor, same_bits
from ..files import Files
from ..folder import open_step
from ..manifest import Manifest, StoredArray
from ..planning.coverage import describe
from ..planning.tiling import cut_part
from .reader import Reader

PART_BYTES = 64 * 2**20
"""Host memory for one part of an array that is read, compared or exported."""


def parts(array: StoredArray, limit: int = PART_BYTES) -> list[Box]:
    """Cut an array into boxes of at most about `limit` bytes, in row-major order."""
    whole = Box.whole(array.shape)
    rows = next((extent for extent in whole.shape if extent > 1), 1)
    count = min(rows, -(-array.bytes // limit))
    return [cut_part(whole, index, count) for index in range(count)] if count > 1 else [whole]


def read_array(files: Files, manifest: Manifest, key: str) -> torch.Tensor:
    """Read one whole array, and check its digests."""
    array = manifest.arrays[key]
    return as_tensor(Reader(files, manifest).read([(array, Box.whole(array.shape))])[0], array.dtype)


@dataclass
class Difference:
    """The difference of one array between two steps. `largest`: largest absolute difference of two values."""

    key: str
    what: str
    elements: int = 0
    largest: float = 0.0


def diff(one: Files, other: Files) -> Iterator[Difference]:
    """Yield the arrays in which two steps differ, bit for bit. Host memory stays within a few parts of an array."""
    first, second = open_step(one), open_step(other)
    readers = Reader(one, first), Reader(other, second)
    for key in sorted({*first.arrays, *second.arrays}):
        a, b = first.arrays.get(key), second.arrays.get(key)
        if a is None or b is None:
            yield Difference(key, f"only in {(other if a is None else one).label()}")
        elif (a.dtype, a.shape) != (b.dtype, b.shape):
            yield Difference(key, f"{a.dtype}{list(a.shape)} became {b.dtype}{list(b.shape)}")
        else:
            found = Difference(key, "")
            for box in parts(a):
                x, y = (as_tensor(r.read([(v, box)])[0], v.dtype) for r, v in zip(readers, (a, b), strict=True))
                _compare(found, x, y, box)
            if found.elements:
                yield found


def _compare(found: Difference, x: torch.Tensor, y: torch.Tensor, box: Box) -> None:
    unequal = same_bits(x) != same_bits(y)
    count = int(unequal.sum())
    if not count:
        return
    if not found.elements:
        found.what = f"differs, first in {describe(box)}"
    found.elements += count
    if x.is_floating_point():
        gap = (x[unequal].double() - y[unequal].double()).abs().nan_to_num(nan=float("inf"))
        found.largest = max(found.largest, float(gap.max()))
