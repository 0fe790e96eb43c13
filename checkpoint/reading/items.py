"""Bytes of a step's files that hold the values of wanted boxes, and the places of the values in them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...parallel.box import Box
from ..errors import CheckpointError
from ..manifest import StoredArray, StoredBox
from .index import Locator
from .raw import RAW

# Most bytes of a file between the first and the last that are read at once; one item's share of it is at most half.
BATCH_BYTES = 16 * 2**20
# Results smaller than this share memory, a slab of so many bytes at most: fresh memory costs less in huge pages.
SMALL_BYTES = 4 * 2**20
SLAB_BYTES = 32 * 2**20

Raw = np.ndarray[Any, np.dtype[Any]]
Bytes = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True)
class ReadItem:
    """Some values of the common part of a stored box and a wanted one, small enough to be read at once.

    part           their region of the global array
    start, stop    bytes of the file from the first to the last wanted one
    shape, strides (panels, …, columns of a panel) as they lie in the file; strides in bytes
    target         where the values go: `target[part.slices(origin)]`
    """

    file: int
    item_bytes: int
    part: Box
    start: int
    stop: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    target: Raw
    origin: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Bytes that are wanted."""
        return math.prod(self.shape) * self.item_bytes

    def runs(self) -> tuple[np.ndarray[Any, np.dtype[np.int64]], int]:
        """Return the first byte of each contiguous run, relative to `start`, and the length that all runs have."""
        run_bytes, dims = self.item_bytes, len(self.shape)
        while dims > 0 and (run_bytes == self.strides[dims - 1] or self.shape[dims - 1] == 1):
            run_bytes *= self.shape[dims - 1]  # the dims inside are stored without a gap
            dims -= 1
        starts = np.zeros(1, np.int64)
        for extent, stride in zip(self.shape[:dims], self.strides[:dims], strict=True):
            starts = (starts[:, None] + np.arange(extent, dtype=np.int64) * stride).reshape(-1)
        return starts, run_bytes

    def place(self, buffer: Bytes, base: int) -> None:
        """Copy the values out of a buffer that starts at file offset `base`."""
        place = self.target[(*self.part.slices(self.origin), ...)]
        stored = self._stored(buffer, base)
        if self.shape[0] == 1:
            place[...] = stored.reshape(self.part.shape)
        else:  # a panel's columns lie side by side in the array
            shape = (*self.part.shape[:-1], self.shape[0], self.shape[-1])
            strides = (*place.strides[:-1], place.strides[-1] * self.shape[-1], place.strides[-1])
            np.lib.stride_tricks.as_strided(place, shape, strides)[...] = np.moveaxis(stored, 0, -2)

    def values(self, buffer: Bytes, base: int) -> Raw:
        """Return the values, contiguous, in the shape of the part. They may be in the buffer, which starts at `base`."""
        return np.require(np.moveaxis(self._stored(buffer, base), 0, -2).reshape(self.part.shape), requirements=("C", "A"))

    def _stored(self, buffer: Bytes, base: int) -> Raw:
        return np.ndarray(self.shape, RAW[self.item_bytes], buffer.data, self.start - base, self.strides)


def read_items(array: StoredArray, box: Box, target: Raw, locator: Locator) -> list[ReadItem]:
    """List the reads for one box of one array. Raises CheckpointError if the array doesn't contain the box."""
    if len(box.shape) != len(array.shape) or any(end > size for end, size in zip(box.ends, array.shape, strict=True)):
        raise CheckpointError(f"{array.key}: {box} is outside of the stored shape {list(array.shape)}")
    items: list[ReadItem] = []
    for stored in locator.boxes(array, box):
        part = stored.box.intersect(box) if box.shape else box
        if part is not None:
            items += _items_of(array, stored, part, target, box.offsets)
    return items


def header_items(number: int, target: Raw) -> Iterator[ReadItem]:
    """List the reads of a file's header, as of an array of bytes."""
    box = Box((0,), target.shape)
    stored = StoredBox(box, number, 0, len(target))
    yield from _items_of(StoredArray("header", "", "U8", target.shape), stored, box, target, (0,))


def _items_of(array: StoredArray, stored: StoredBox, part: Box, target: Raw, origin: tuple[int, ...]) -> Iterator[ReadItem]:
    """Cut a region of a stored box into what can be read at once. Whole panels stay together where they fit."""
    lead, columns = stored.box.shape[:-1], (stored.box.shape or (1,))[-1]
    width = columns // stored.panels
    strides = [array.item_bytes]
    for extent in reversed((*lead, width)):
        strides.insert(0, strides[0] * extent)
    inside = [a - b for a, b in zip(part.offsets, stored.box.offsets, strict=True)]
    low, high = (inside[-1], inside[-1] + part.shape[-1]) if part.shape else (0, 1)
    for panel, panels, column, count in _panels(low, high, width):
        region = Box((panel, *inside[:-1], column), (panels, *part.shape[:-1], count))
        for each in _cut(region, strides, array.item_bytes):
            start = stored.start + sum(at * stride for at, stride in zip(each.offsets, strides, strict=True))
            offsets, shape = each.offsets, each.shape
            where = Box((), ())
            if part.shape:
                first = (*offsets[1:-1], offsets[0] * width + offsets[-1])
                where = Box(first, (*shape[1:-1], shape[0] * shape[-1])).shifted(stored.box.offsets)
            stop = start + _span(each, strides, array.item_bytes)
            yield ReadItem(stored.file, array.item_bytes, where, start, stop, shape, tuple(strides), target, origin)


def _panels(low: int, high: int, width: int) -> Iterator[tuple[int, int, int, int]]:
    """Cut columns `[low, high)` of a box into (first panel, panels, first column in it, columns in each)."""
    while low < high:
        panel, column = divmod(low, width)
        if column or high - low < width:
            count = min(width - column, high - low)
            yield panel, 1, column, count
            low += count
        else:
            panels = (high - low) // width
            yield panel, panels, 0, width
            low += panels * width


def _span(region: Box, strides: Sequence[int], item_bytes: int) -> int:
    return sum((extent - 1) * stride for extent, stride in zip(region.shape, strides, strict=True)) + item_bytes


def _cut(region: Box, strides: Sequence[int], item_bytes: int) -> Iterator[Box]:
    """Cut a region along its first dims until each part spans at most half a batch of the file."""
    span = _span(region, strides, item_bytes)
    dim = next((dim for dim, extent in enumerate(region.shape) if extent > 1), None)
    if dim is None or span <= BATCH_BYTES // 2:
        yield region
        return
    step = max(1, region.shape[dim] * (BATCH_BYTES // 2) // span)
    for at in range(0, region.shape[dim], step):
        yield from _cut(region.cut(dim, at, min(step, region.shape[dim] - at)), strides, item_bytes)


def needed_leaves(items: Sequence[ReadItem], base: int, stop: int, leaf: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Mark the leaves of the span `[base, stop)` that hold wanted bytes."""
    count = -(-(stop - base) // leaf)
    edges = np.zeros(count + 1, np.int64)
    for item in items:
        starts, run_bytes = item.runs()
        first = (item.start - base + starts) // leaf
        last = (item.start - base + starts + run_bytes - 1) // leaf
        np.add.at(edges, first, 1)
        np.add.at(edges, last + 1, -1)
    return np.cumsum(edges[:-1]) > 0


def empty_results(shapes: Sequence[tuple[tuple[int, ...], int]]) -> list[Raw]:
    """Allocate arrays of raw integers for results, of these shapes and bytes an element. Small ones share slabs."""
    results: list[Raw] = []
    slab, at = np.empty(0, np.uint8), 0
    left = sum(-(-math.prod(shape) * size // 64) * 64 for shape, size in shapes if math.prod(shape) * size < SMALL_BYTES)
    for shape, size in shapes:
        length = math.prod(shape) * size
        if length >= SMALL_BYTES:
            results.append(np.empty(shape, RAW[size]))
            continue
        room = -(-length // 64) * 64
        if at + room > len(slab):
            slab, at = np.empty(min(left, SLAB_BYTES), np.uint8), 0
        results.append(slab[at : at + length].view(RAW[size]).reshape(shape))
        at, left = at + room, left - room
    return results
