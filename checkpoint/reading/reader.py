"""Reading any boxes out of a checkpoint: only the leaves that hold them, each checked before its bytes are used."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import xxhash

from ...parallel.box import Box
from ..digest import DIGEST_BYTES, leaf_digests, text_digest
from ..errors import DamageError
from ..files import Files, RangeReader
from ..folder import length_faults, part_faults, raise_first
from ..manifest import MANIFEST, Manifest, StoredArray, StoredBox
from ..stored_file import StoredFile
from .index import FileIndex, Locator
from .items import BATCH_BYTES, Bytes, Raw, ReadItem, empty_results, header_items, needed_leaves, read_items
from .raw import RAW

# Leaves' digests are read and proved for so many blocks at once, and those read last are kept for the next boxes.
PROOF_BLOCKS = 4
PROOFS_KEPT = 8


@dataclass
class Span:
    """Bytes `[base, stop)` of a file, of which the needed leaves are read and checked.

    needed  which leaves, from the one at `base` on
    buffer  holds the byte at `base` first; empty: a reused one is lent
    """

    file: int
    base: int
    stop: int
    needed: np.ndarray[Any, np.dtype[np.bool_]]
    buffer: Bytes
    items: Sequence[ReadItem] = ()

    def runs(self, leaf: int) -> list[tuple[int, int]]:
        """List the runs of needed leaves, as bytes counted from `base`."""
        edges = np.flatnonzero(np.diff(np.concatenate(([False], self.needed, [False])).astype(np.int8)))
        return [(first * leaf, min(last * leaf, self.stop - self.base)) for first, last in edges.reshape(-1, 2).tolist()]


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
        self._proving: dict[tuple[int, int], Future[bytes]] = {}
        self._blocks: dict[int, bytes] = {}
        self._counting = threading.Lock()
        self._once: dict[int, threading.Lock] = {}  # of a file: held while its length or its blocks' digests are asked for
        self._measured: set[int] = set()
        self.whole_files = True  # otherwise a segment is read though its file be too short for others
        self._locator = Locator(self.manifest, self.files.label(MANIFEST))

    def read(self, wanted: Iterable[tuple[StoredArray, Box]]) -> list[Raw]:
        """The values of each wanted box, as unsigned integers of the element's size.

        Raises DamageError naming file and block if any byte read is not what was written.
        """
        wanted = list(wanted)
        results = empty_results([(box.shape, array.item_bytes) for array, box in wanted])
        items = [item for own in self.items(wanted, results) for item in own]
        for item, buffer, base in self.fetch(items):
            item.place(buffer, base)
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
            yield numbers[id(item)], item.part, item.values(buffer, base)

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
            item.place(buffer, base)
        self.traffic.wanted = wanted_before  # nobody has asked for a header
        for number, header in headers.items():
            label = self.files.label(self.manifest.files[number].title)
            self._locator.indexes[number] = FileIndex.parse(self.manifest, number, header.tobytes(), label)

    def fetch(self, items: list[ReadItem]) -> Iterator[tuple[ReadItem, Bytes, int]]:
        """Each item with a buffer that holds its checked bytes, and the file offset of the buffer's first byte.

        The buffer is reused: take what is needed before asking for the next item.
        """
        spans = list(self._spans(sorted(items, key=lambda item: (item.file, item.start))))
        for span in self.read_ahead(spans):
            for item in span.items:
                self.traffic.wanted += item.bytes
                yield item, span.buffer, span.base

    def read_ahead(self, spans: Sequence[Span]) -> Iterator[Span]:
        """Yield spans in their order, each with its bytes read and checked, while the next ones are being read.

        As many are read at once as the files allow, each in a thread; they are checked in this one. So memory holds one span
        more than that. Either all spans have buffers, or none has: then the buffers lent are used for later spans again.
        No thread is left when this ends, be it early. Raises as `read` does, for the first span in order that is bad.
        """
        workers = min(self.files.parallel_reads, len(spans))
        spare: list[Bytes] = []
        if workers < 2:
            yield from self._read_in_turn(spans, spare)
            return
        with ThreadPoolExecutor(workers, "checkpoint-read") as pool:
            waiting: deque[tuple[Span, Future[None]]] = deque()
            try:
                for span in spans:
                    lent = self._lend(span, spare)
                    self._prove_ahead(span, pool)
                    waiting.append((lent, pool.submit(self._open_and_fill, lent)))
                    if len(waiting) > workers:
                        yield from self._finish(waiting, spare)
                while waiting:
                    yield from self._finish(waiting, spare)
            finally:
                self._proving.clear()
                pool.shutdown(wait=True, cancel_futures=True)

    def _finish(self, waiting: deque[tuple[Span, Future[None]]], spare: list[Bytes]) -> Iterator[Span]:
        """Yield the first of the spans that are being read, once it is there and checked.

        A future that has failed and a frame that names it would hold each other, and with them all that the callers have read,
        until garbage is collected. So it has no name here.
        """
        span = waiting[0][0]
        waiting.popleft()[1].result()
        self._check(span)
        yield span
        spare.append(span.buffer)

    def _read_in_turn(self, spans: Iterable[Span], spare: list[Bytes]) -> Iterator[Span]:
        with contextlib.ExitStack() as stack:
            opened: tuple[int, RangeReader] | None = None
            for span in spans:
                if opened is None or opened[0] != span.file:
                    stack.close()  # of thousands of ranks' files one is open at a time
                    opened = span.file, stack.enter_context(self.open(span.file))
                lent = self._lend(span, spare)
                self._fill(lent, opened[1])
                self._check(lent)
                yield lent
                spare.append(lent.buffer)

    def _missing_indexes(self, wanted: Sequence[tuple[StoredArray, Box]]) -> list[int]:
        return self._locator.files_with(wanted)

    @contextlib.contextmanager
    def open(self, number: int) -> Generator[RangeReader]:
        """Open a rank's data for reading from its first byte on, after a look at the file's length."""
        file = self.manifest.files[number]
        with self._lock_of(number):
            self._measure(number)
        with self.files.reader(file.name) as opened:
            yield _From(opened, file.start) if file.start else opened

    def _measure(self, number: int) -> None:
        file = self.manifest.files[number]
        if file.has_digests and number not in self._measured:
            sizes = {name: self.files.size(name) for name in {file.name, file.leaves}}
            faults = length_faults if self.whole_files else part_faults
            raise_first(faults(self.files, self.manifest, file, sizes))
            self._measured.add(number)

    def _lock_of(self, number: int) -> threading.Lock:
        return self._once.setdefault(number, threading.Lock())

    def _spans(self, items: Sequence[ReadItem]) -> Iterator[Span]:
        """Gather items, sorted by file and start, into spans of at most BATCH_BYTES of a file."""
        gap = self.files.merge_gap
        batch: list[ReadItem] = []
        end = 0
        for item in items:
            if batch and (
                item.file != batch[0].file
                or item.stop - batch[0].start > BATCH_BYTES
                or (gap and item.start - end > gap)  # far apart where a request costs much: several at once
            ):
                yield self._span(batch, end)
                batch, end = [], 0
            batch.append(item)
            end = max(end, item.stop)
        if batch:
            yield self._span(batch, end)

    def _span(self, batch: list[ReadItem], end: int) -> Span:
        leaf, number = self.manifest.leaf_bytes, batch[0].file
        base = batch[0].start // leaf * leaf
        stop = min(-(-end // leaf) * leaf, self.manifest.files[number].bytes)
        return Span(number, base, stop, needed_leaves(batch, base, stop, leaf), np.empty(0, np.uint8), batch)

    def _lend(self, span: Span, spare: list[Bytes]) -> Span:
        """Give a span a buffer, unless it has one of its own."""
        length = span.stop - span.base
        if not len(span.buffer):
            fits = [number for number, buffer in enumerate(spare) if len(buffer) >= length]
            most = BATCH_BYTES + 2 * self.manifest.leaf_bytes  # a batch, and what its first and last leaf hold beside
            room = max(length, min(most, self.manifest.files[span.file].bytes))
            spared = spare.pop(fits[0] if fits else 0) if spare else np.empty(0, np.uint8)
            span = replace(span, buffer=spared if fits else np.empty(room, np.uint8))
        return span

    def _open_and_fill(self, span: Span) -> None:
        with self.open(span.file) as reader:
            self._fill(span, reader)

    def _fill(self, span: Span, reader: RangeReader) -> None:
        """Read the needed leaves of a span. Where a request costs much, what lies between near ones is read with them."""
        view = span.buffer.data
        requests: list[tuple[int, int]] = []
        for low, high in span.runs(self.manifest.leaf_bytes):
            if requests and low - requests[-1][1] < self.files.merge_gap:
                low = requests.pop()[0]
            requests.append((low, high))
        for low, high in requests if len(requests) > 1 else ():  # many small reads, each waited for, leave the disk idle
            reader.expect(span.base + low, high - low)
        for low, high in requests:
            reader.fill(view[low:high], span.base + low)
            self._count(high - low)

    def _check(self, span: Span) -> None:
        """Hold the needed leaves of a span to their digests. Raises DamageError."""
        number, leaf = span.file, self.manifest.leaf_bytes
        if not self.manifest.files[number].has_digests:
            return
        view = span.buffer.data
        proof_bytes = PROOF_BLOCKS * self.manifest.block_bytes
        for low, high in span.runs(leaf):
            while low < high:
                proof, inside = divmod(span.base + low, proof_bytes)
                stop = min(high, low + proof_bytes - inside)
                first, last = inside // leaf * DIGEST_BYTES, -(-(inside + stop - low) // leaf) * DIGEST_BYTES
                said = self._prove(number, proof)[first:last]
                found = leaf_digests(view[low:stop], leaf)
                if found != said:
                    pairs = zip(*(np.frombuffer(each, f"V{DIGEST_BYTES}") for each in (found, said)), strict=True)
                    bad = next(index for index, (is_, should) in enumerate(pairs) if is_ != should)
                    raise self._damage(number, span.base + low + bad * leaf, "its bytes do not match their digest")
                low = stop

    def _proofs_of(self, span: Span) -> Iterator[int]:
        """Yield the numbers of the proofs of a span's needed leaves, ascending."""
        proof_leaves = PROOF_BLOCKS * (self.manifest.block_bytes // self.manifest.leaf_bytes)
        leaves = span.base // self.manifest.leaf_bytes + np.flatnonzero(span.needed)
        yield from np.unique(leaves // proof_leaves).tolist() if len(leaves) else ()

    def _prove_ahead(self, span: Span, pool: ThreadPoolExecutor) -> None:
        """Begin to read the digests that a span will be held to."""
        if self.manifest.files[span.file].has_digests:
            for key in ((span.file, proof) for proof in self._proofs_of(span)):
                if key in self._proved:
                    self._proved[key] = self._proved.pop(key)  # the next to be dropped is another
                elif key not in self._proving:
                    self._proving[key] = pool.submit(self._read_proof, *key)

    def _prove(self, number: int, proof: int) -> bytes:
        """The digests of the leaves of the next PROOF_BLOCKS blocks of a file, proved by the manifest's digests of these."""
        if (number, proof) not in self._proved:
            if (number, proof) in self._proving:
                data = self._proving.pop((number, proof)).result()  # kept in no variable: see `_finish`
            else:
                data = self._read_proof(number, proof)
            while len(self._proved) >= PROOFS_KEPT:
                del self._proved[next(iter(self._proved))]
            self._proved[number, proof] = data
        return self._proved[number, proof]

    def _read_proof(self, number: int, proof: int) -> bytes:
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
        return data

    def blocks_of(self, number: int) -> bytes:
        """The digests of a file's blocks: the manifest's, or those behind the leaves', proved by the manifest's of the file."""
        file = self.manifest.files[number]
        with self._lock_of(number):
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
        self._count(size)
        return bytes(data)

    def _count(self, size: int) -> None:
        with self._counting:
            self.traffic.read += size

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
