"""Index of a data file: which boxes it holds and where, read from its own header.

The manifest says which ranks wrote parts of an array. Their files' headers say at which bytes each part lies. So a reader
looks at the headers of the files that it needs, and at no list of all boxes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xxhash

from ...parallel.box import Box
from ..errors import DamageError
from ..manifest import ITEM_BYTES, Manifest, StoredArray, StoredBox, entry_name
from ..planning.columns import Integers

PARTS_KEPT = 2**16
"""Stored parts that are remembered for arrays cut alike, some 20 MB."""


@dataclass(frozen=True)
class FileIndex:
    """The boxes in one file, in a few bytes each: a reader of whole arrays has the indexes of thousands of files.

    number  of the file in the manifest; label: its name, for messages
    names   (boxes,) sorted hashes of each box's name, type and shape
    starts  (boxes,) its first byte, counted from the start of the file; panels: (boxes,) as `StoredBox.panels`
    """

    number: int
    label: str
    names: np.ndarray[Any, np.dtype[np.uint64]]
    starts: Integers
    panels: Integers

    @classmethod
    def parse(cls, manifest: Manifest, number: int, header: bytes, label: str) -> FileIndex:
        """Read a file's header. Raises DamageError if it is not as the format says."""
        file = manifest.files[number]
        try:
            rows = sorted(_rows(header, file.header, file.bytes))
        except (ValueError, KeyError, TypeError) as error:
            raise DamageError(label, f"its header and the manifest disagree: {error}") from error
        names, starts, panels = ([row[column] for row in rows] for column in range(3))
        return cls(number, label, np.array(names, np.uint64), np.array(starts, np.int64), np.array(panels, np.int64))

    def find(self, array: StoredArray, box: Box) -> StoredBox:
        """Find a box of an array. Raises DamageError if the file does not hold it as the manifest says."""
        name = _hash(entry_name(array.key, box), array.dtype, box.shape)
        at = int(np.searchsorted(self.names, np.uint64(name)))  # a Python int would be compared as float64
        if at == len(self.names) or int(self.names[at]) != name:
            what = f"its header and the manifest disagree: {array.dtype} box {entry_name(array.key, box)} is not in it"
            raise DamageError(self.label, what)
        start = int(self.starts[at])
        return StoredBox(box, self.number, start, start + box.numel * array.item_bytes, int(self.panels[at]))

    def boxes(self, manifest: Manifest) -> Iterator[tuple[StoredArray, StoredBox]]:
        """Yield the boxes that the manifest says are in the file, each with its array. Raises DamageError, as `find` does."""
        rank = manifest.files[self.number].rank
        for array in manifest.arrays.values():
            for part in manifest.tilings[array.tiling].written_by(rank, array.item_bytes, array.turn):
                yield array, self.find(array, part)


def _rows(header: bytes, expected: int, size: int) -> Iterator[tuple[int, int, int]]:
    """Yield (hash, first byte, panels) of each box that a header lists. Raises ValueError, KeyError or TypeError."""
    length = 8 + int.from_bytes(header[:8], "little")
    if not length == len(header) == expected:
        raise ValueError(f"it has {length} bytes, not {expected}")
    entries: dict[str, Any] = json.loads(header[8:])
    entries.pop("__metadata__", None)
    for name, entry in entries.items():
        shape, (start, stop) = tuple(entry["shape"]), entry["data_offsets"]
        panels, box_shape = _without_panels(shape, dims=name.rpartition("@")[2].count(",") + (not name.endswith("@")))
        numel = Box.whole(shape).numel
        if start < 0 or stop > size - length or stop - start != numel * ITEM_BYTES[entry["dtype"]]:
            raise ValueError(f"{name} is {entry['dtype']}{list(shape)} at bytes {start}–{stop}")
        yield _hash(name, entry["dtype"], box_shape), length + start, panels


def _without_panels(shape: tuple[int, ...], dims: int) -> tuple[int, tuple[int, ...]]:
    """Return the panels of an entry, and the shape of its box."""
    if len(shape) == dims:
        return 1, shape
    if len(shape) != dims + 1 or dims == 0 or shape[0] < 1:
        raise ValueError(f"shape {list(shape)} is none of a box of {dims} dims")
    return shape[0], (*shape[1:-1], shape[-1] * shape[0])


def _hash(name: str, dtype: str, shape: tuple[int, ...]) -> int:
    return xxhash.xxh3_64_intdigest(f"{name} {dtype} {shape}".encode())


@dataclass
class Locator:
    """Finds the boxes of arrays in the files of a step, by the indexes that are loaded."""

    manifest: Manifest
    label: str
    indexes: dict[int, FileIndex] = field(default_factory=dict[int, FileIndex])

    def __post_init__(self) -> None:
        self._number_of = {file.rank: number for number, file in enumerate(self.manifest.files)}
        self._known: dict[tuple[int, int, int, Box], list[tuple[int, Box]]] = {}
        self._known_parts = 0

    def files_with(self, wanted: Iterable[tuple[StoredArray, Box]]) -> list[int]:
        """List the files, by number, whose indexes say where parts of these boxes are, and are not loaded yet."""
        found = {number for array, box in wanted if array.tiling >= 0 for number, _ in self._parts(array, box)}
        return sorted(found - self.indexes.keys())

    def boxes(self, array: StoredArray, box: Box) -> Sequence[StoredBox]:
        """Return the stored boxes of an array that have something in common with a box. The indexes must be loaded."""
        if array.tiling < 0:
            return array.boxes
        return [self.indexes[number].find(array, part) for number, part in self._parts(array, box)]

    def _parts(self, array: StoredArray, box: Box) -> list[tuple[int, Box]]:
        """List the stored parts of an array that a box needs, each with the number of its file."""
        key = (array.tiling, array.item_bytes, array.turn, box)
        if key not in self._known:  # many arrays are cut alike, and each is asked for twice
            parts: list[tuple[int, Box]] = []
            for rank, part in self.manifest.tilings[array.tiling].parts(array.item_bytes, array.turn, box):
                if rank not in self._number_of:
                    raise DamageError(self.label, f"rank {rank} wrote a part of {array.key}, and has no file")
                parts.append((self._number_of[rank], part))
            self._known_parts += len(parts)
            if self._known_parts > PARTS_KEPT:
                self._known.clear()
                self._known_parts = len(parts)
            self._known[key] = parts
        return self._known[key]
