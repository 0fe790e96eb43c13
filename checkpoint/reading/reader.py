"""Reading any boxes out of a checkpoint: only the leaves that hold them, each checked before its bytes are used."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xxhash

from ...parallel.box import Box
from ..digest import DIGEST_BYTES, text_digest
from ..errors import CheckpointError, DamageError
from ..files import Files, RangeReader
from ..folder import length_faults, part_faults, raise_first
from ..manifest import MANIFEST, Manifest, StoredArray, StoredBox
from ..stored_file import StoredFile
from .index import FileIndex, Locator
from .raw import RAW

# Most bytes of a file between the first and the last that are read at once; one item's share of it is at most half.
BATCH_BYTES = 16 * 2**20
# Neighbouring needs closer than this are fetched by one read.
GAP_BYTES = 64 * 2**10
# Leaves' digests are read and proved for so many blocks at once, and those read last are kept for the next boxes.
PROOF_BLOCKS = 4
PROOFS_KEPT = 8

Raw = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class ReadItem:
    """Some rows of the common part of a stored box and a wanted one, small enough to be read at once.

    stored, part  the stored box and the wanted region of it, both in the global array
    start, stop   bytes of the file from the first to the last wanted one
    runs          (first byte of each contiguous run, relative to `start`; length of each) — all runs are equally long
    target        where the values go: `target[part.slices(origin)]`
    """

    file: int
    item_bytes: int
    part: Box
    start: int
    stop: int
    run_starts: np.ndarray[Any, np.dtype[np.int64]]
    run_bytes: int
    target: Raw
    origin: tuple[int, ...]


@dataclass
class ReadBytes:
    """Bytes that were wanted, and bytes that were read for them (whole leaves, and the leaves' digests)."""

    wanted: int = 0
    read: int = 0


@dataclass
class Reader:
    """Reads wanted boxes of one step's arrays into NumPy arrays of raw integers."""

    files: Files
    manifest: Manifest
    traffic: ReadBytes = field(default_factory=ReadBytes)

    def __post_init__(self) -> None:
        self._proved: dict[tuple[int, int], bytes] = {}
        self._blocks: dict[int, bytes] = {}
        self._measured: set[int] = set()
        self.whole_files = True  # otherwise a segment is read though its file be too short for others
        self._locator = Locator(self.manifest, self.files.label(MANIFEST))

    def read(self, wanted: Iterable[tuple[StoredArray, Box]]) -> list[Raw]:
        """The values of each wanted box, as unsigned integers of the element's size.

        Raises DamageError naming file and block if any byte read is not what was written.
        """
        wanted = list(wanted)
        results = [np.empty(box.shape, RAW[array.item_bytes]) for array, box in wanted]
        items = [item for own in self.items(wanted, results) for item in own]
        for item, buffer, base in self.fetch(items):
            place(item, buffer, base)
        return results

    def stream(self, wanted: Sequence[tuple[StoredArray, Box]]) -> Iterator[tuple[int, Box, Raw]]:
        """Yield the values of wanted boxes piece by piece, in the order of the files: (number of the box, region, values).

        Values are unsigned integers of the element's size, good until the next ones. Raises DamageError, as `read` does.
        """
        items: list[ReadItem] = []
        numbers: dict[int, int] = {}
        for number, own in enumerate(self.items(wanted)):
            numbers |= {id(item): number for item in own}
            items += own
        for item, buffer, base in self.fetch(items):
            yield numbers[id(item)], item.part, values_of(item, buffer, base)

    def items(self, wanted: Sequence[tuple[StoredArray, Box]], targets: Sequence[Raw] = ()) -> list[list[ReadItem]]:
        """List the reads for each wanted box, after reading the indexes of the files that hold them.

        targets: where the values go, if they are to be placed. Raises as `read` does.
        """
        self.load_indexes(wanted)
        return [
            read_items(array, box, targets[number] if targets else np.empty(0, RAW[array.item_bytes]), self._locator)
            for number, (array, box) in enumerate(wanted)
        ]

    def load_indexes(self, wanted: Sequence[tuple[StoredArray, Box]]) -> None:
        """Read the headers of the files that hold parts of these boxes, unless they have been read."""
        self._load(self._missing_indexes(wanted))

    def index_of(self, number: int) -> FileIndex:
        """Return the index of a file. Raises as `read` does."""
        self._load({number} - self._locator.indexes.keys())
        return self._locator.indexes[number]

    def _load(self, numbers: Iterable[int]) -> None:
        headers = {number: np.empty(self.manifest.files[number].header, np.uint8) for number in numbers}
        items = [item for number, header in headers.items() for item in header_items(number, header)]
        wanted_before = self.traffic.wanted
        for item, buffer, base in self.fetch(items):
            place(item, buffer, base)
        self.traffic.wanted = wanted_before  # nobody has asked for a header
        for number, header in headers.items():
            label = self.files.label(self.manifest.files[number].title)
            self._locator.indexes[number] = FileIndex.parse(self.manifest, number, header.tobytes(), label)

    def fetch(self, items: list[ReadItem]) -> Iterator[tuple[ReadItem, np.ndarray[Any, np.dtype[np.uint8]], int]]:
        """Each item with a buffer that holds its checked bytes, and the file offset of the buffer's first byte.

        The buffer is reused: take what is needed before asking for the next item.
        """
        items = sorted(items, key=lambda item: (item.file, item.start))
        buffer = np.empty(0, np.uint8)
        with contextlib.ExitStack() as stack:
            opened: tuple[int, RangeReader] | None = None
            for batch in self._batches(items):
                number = batch[0].file
                if opened is None or opened[0] != number:
                    stack.close()  # of thousands of ranks' files one is open at a time
                    opened = number, stack.enter_context(self.open(number))
                leaf = self.manifest.leaf_bytes
                base = batch[0].start // leaf * leaf
                stop = min(-(-max(item.stop for item in batch) // leaf) * leaf, self.manifest.files[number].bytes)
                if len(buffer) < stop - base:
                    buffer = np.empty(max(stop - base, min(BATCH_BYTES, self.manifest.files[number].bytes)), np.uint8)
                self._read_checked(*opened, base, stop, needed_leaves(batch, base, stop, leaf), buffer)
                for item in batch:
                    self.traffic.wanted += len(item.run_starts) * item.run_bytes
                    yield item, buffer, base

    def _missing_indexes(self, wanted: Sequence[tuple[StoredArray, Box]]) -> list[int]:
        return self._locator.files_with(wanted)

    @contextlib.contextmanager
    def open(self, number: int) -> Generator[RangeReader]:
        """Open a rank's data for reading from its first byte on, after a look at the file's length."""
        file = self.manifest.files[number]
        if file.has_digests and number not in self._measured:
            sizes = {name: self.files.size(name) for name in {file.name, file.leaves}}
            faults = length_faults if self.whole_files else part_faults
            raise_first(faults(self.files, self.manifest, file, sizes))
            self._measured.add(number)
        with self.files.reader(file.name) as opened:
            yield _From(opened, file.start) if file.start else opened

    def _batches(self, items: list[ReadItem]) -> Iterator[list[ReadItem]]:
        batch: list[ReadItem] = []
        for item in items:
            if batch and (
                item.file != batch[0].file
                or item.stop - batch[0].start > BATCH_BYTES
                or item.start - max(other.stop for other in batch[-1:]) > GAP_BYTES
            ):
                yield batch
                batch = []
            batch.append(item)
        if batch:
            yield batch

    def _read_checked(
        self, number: int, reader: RangeReader, base: int, stop: int, needed: np.ndarray[Any, np.dtype[np.bool_]], buffer: Any
    ) -> None:
        leaf = self.manifest.leaf_bytes
        proof_leaves = PROOF_BLOCKS * (self.manifest.block_bytes // leaf)
        view = memoryview(buffer)
        edges = np.flatnonzero(np.diff(np.concatenate(([False], needed, [False])).astype(np.int8)))
        runs = [(first * leaf, min(last * leaf, stop - base)) for first, last in edges.reshape(-1, 2).tolist()]
        for low, high in runs if len(runs) > 1 else ():  # many small reads, each waited for, would leave the disk idle
            reader.expect(base + low, high - low)
        for low, high in runs:
            reader.fill(view[low:high], base + low)
            self.traffic.read += high - low
            if not self.manifest.files[number].has_digests:
                continue
            digests, known = b"", -1
            for at in range(low, high, leaf):
                proof, index = divmod((base + at) // leaf, proof_leaves)
                if proof != known:
                    digests, known = self._prove(number, proof), proof
                said = digests[index * DIGEST_BYTES : (index + 1) * DIGEST_BYTES]
                if xxhash.xxh3_128_digest(view[at : min(at + leaf, high)]) != said:
                    raise self._damage(number, base + at, "its bytes do not match their digest")

    def _prove(self, number: int, proof: int) -> bytes:
        """The digests of the leaves of the next PROOF_BLOCKS blocks of a file, proved by the manifest's digests of these."""
        if (number, proof) not in self._proved:
            file = self.manifest.files[number]
            first = proof * PROOF_BLOCKS
            blocks = self.blocks_of(number)[first * DIGEST_BYTES : (first + PROOF_BLOCKS) * DIGEST_BYTES]
            span = self.manifest.block_bytes // self.manifest.leaf_bytes * DIGEST_BYTES
            size = min(PROOF_BLOCKS * span, self.manifest.leaf_count(file) * DIGEST_BYTES - first * span)
            data = self._read_digests(file, first * span, size)
            for block, at in enumerate(range(0, size, span)):
                expected = blocks[block * DIGEST_BYTES : (block + 1) * DIGEST_BYTES]
                if xxhash.xxh3_128_digest(data[at : at + span]) != expected:
                    what = f"the digests of {file.name} do not match the manifest"
                    raise DamageError(self.files.label(file.leaves_title), what, first + block)
            while len(self._proved) >= PROOFS_KEPT:
                del self._proved[next(iter(self._proved))]
            self._proved[number, proof] = data
        return self._proved[number, proof]

    def blocks_of(self, number: int) -> bytes:
        """The digests of a file's blocks: the manifest's, or those behind the leaves', proved by the manifest's of the file."""
        file = self.manifest.files[number]
        if number not in self._blocks:
            start = self.manifest.leaf_count(file) * DIGEST_BYTES
            blocks = file.blocks or self._read_digests(file, start, self.manifest.leaves_bytes(file) - start)
            if not file.blocks and text_digest(blocks) != file.digest:
                what = f"the digests of {file.name} do not match the manifest"
                raise DamageError(self.files.label(file.leaves_title), what)
            self._blocks[number] = blocks
        return self._blocks[number]

    def leaves_of(self, number: int) -> bytes:
        """The digests of a file's leaves, as they are: nothing has proved them."""
        file = self.manifest.files[number]
        return self._read_digests(file, 0, self.manifest.leaf_count(file) * DIGEST_BYTES)

    def _read_digests(self, file: StoredFile, start: int, size: int) -> bytes:
        data = bytearray(size)
        with self.files.reader(file.leaves) as reader:
            reader.fill(memoryview(data), file.digests_start + start)
        self.traffic.read += size
        return bytes(data)

    def boxes(self, array: StoredArray) -> Sequence[StoredBox]:
        """Return all boxes that an array is stored in. Raises as `read` does."""
        whole = Box.whole(array.shape)
        self.load_indexes([(array, whole)])
        return self._locator.boxes(array, whole)

    def _damage(self, number: int, offset: int, what: str) -> DamageError:
        file = self.manifest.files[number]
        stop = offset + self.manifest.leaf_bytes
        index = self._locator.indexes.get(number)
        boxes = () if index is None else index.boxes(self.manifest)
        keys = sorted({array.key for array, stored in boxes if stored.start < stop and stored.stop > offset})
        inside = f" (inside {', '.join(keys[:3])}{', …' if len(keys) > 3 else ''})" if keys else ""
        return DamageError(
            self.files.label(file.title), f"{what}, at byte {offset}{inside}", block=offset // self.manifest.block_bytes
        )


@dataclass(frozen=True)
class _From:
    """An open file from some byte on, which counts as its first."""

    opened: RangeReader
    start: int

    def expect(self, offset: int, length: int) -> None:
        """See RangeReader."""
        self.opened.expect(self.start + offset, length)

    def fill(self, target: memoryview, offset: int) -> None:
        """See RangeReader."""
        self.opened.fill(target, self.start + offset)


def header_items(number: int, target: Raw) -> Iterator[ReadItem]:
    """List the reads of a file's header, as of an array of bytes."""
    box = Box((0,), target.shape)
    yield from _split(StoredArray("header", "", "U8", target.shape), StoredBox(box, number, 0, len(target)), box, target, (0,))


def read_items(array: StoredArray, box: Box, target: Raw, locator: Locator) -> list[ReadItem]:
    """List the reads for one box of one array. Raises CheckpointError if the array doesn't contain the box."""
    items: list[ReadItem] = []
    if len(box.shape) != len(array.shape) or any(end > size for end, size in zip(box.ends, array.shape, strict=True)):
        raise CheckpointError(f"{array.key}: {box} is outside of the stored shape {list(array.shape)}")
    for whole in locator.boxes(array, box):
        if box.shape and whole.box.intersect(box) is None:
            continue
        for stored in whole.parts():
            part = stored.box.intersect(box) if box.shape else box
            if part is not None:
                items += _split(array, stored, part, target, box.offsets)
    return items


def _split(array: StoredArray, stored: StoredBox, part: Box, target: Raw, origin: tuple[int, ...]) -> Iterator[ReadItem]:
    """Cut a region of a stored box along its first dims until each item spans at most half a batch of the file."""
    strides = [array.item_bytes]
    for extent in reversed(stored.box.shape[1:]):
        strides.insert(0, strides[0] * extent)
    if not stored.box.shape:
        strides = []
    relative = [o - s for o, s in zip(part.offsets, stored.box.offsets, strict=True)]
    start = stored.start + sum(r * s for r, s in zip(relative, strides, strict=True))
    stop = start + sum((n - 1) * s for n, s in zip(part.shape, strides, strict=True)) + array.item_bytes
    dim = next((dim for dim, extent in enumerate(part.shape) if extent > 1), None)
    if dim is not None and stop - start > BATCH_BYTES // 2:
        step = max(1, part.shape[dim] * (BATCH_BYTES // 2) // (stop - start))
        for at in range(0, part.shape[dim], step):
            yield from _split(array, stored, part.cut(dim, at, min(step, part.shape[dim] - at)), target, origin)
        return
    run_bytes = array.item_bytes
    dims = len(part.shape)
    while dims > 0 and run_bytes == strides[dims - 1]:  # the dims inside are stored without a gap
        run_bytes *= part.shape[dims - 1]
        dims -= 1
    starts = np.zeros(1, np.int64)
    for extent, stride in zip(part.shape[:dims], strides[:dims], strict=True):
        starts = (starts[:, None] + np.arange(extent, dtype=np.int64) * stride).reshape(-1)
    yield ReadItem(stored.file, array.item_bytes, part, start, stop, starts, run_bytes, target, origin)


def needed_leaves(batch: list[ReadItem], base: int, stop: int, leaf: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Mark the leaves of the span `[base, stop)` that hold wanted bytes."""
    count = -(-(stop - base) // leaf)
    edges = np.zeros(count + 1, np.int64)
    for item in batch:
        first = (item.start - base + item.run_starts) // leaf
        last = (item.start - base + item.run_starts + item.run_bytes - 1) // leaf
        np.add.at(edges, first, 1)
        np.add.at(edges, last + 1, -1)
    return np.cumsum(edges[:-1]) > 0


def place(item: ReadItem, buffer: np.ndarray[Any, np.dtype[np.uint8]], base: int) -> None:
    """Copy an item's values out of a buffer that starts at file offset `base`."""
    item.target[(*item.part.slices(item.origin), ...)] = values_of(item, buffer, base)


def values_of(item: ReadItem, buffer: np.ndarray[Any, np.dtype[np.uint8]], base: int) -> Raw:
    """Return an item's values, in the shape of its part. They may be in the buffer, which starts at file offset `base`."""
    first, starts = item.start - base, item.run_starts
    steps = np.diff(starts)
    if len(starts) == 1:
        values = buffer[first : first + item.run_bytes]
    elif np.all(steps == steps[0]):
        shape, strides = (len(starts), item.run_bytes), (int(steps[0]), 1)
        values = np.ascontiguousarray(np.lib.stride_tricks.as_strided(buffer[first:], shape, strides)).reshape(-1)
    else:
        values = np.concatenate([buffer[first + at : first + at + item.run_bytes] for at in starts.tolist()])
    return values.view(RAW[item.item_bytes]).reshape(item.part.shape)
