"""Reading by many ranks at once: each byte that several of them need is read and checked by one, and passed to the others.

All ranks go through the files in the same order, window by window. In each window the leaves that several ranks need are
dealt out among them; what a rank reads for others it sends, one message per pair and window. So a restore on any number of
ranks reads each needed byte of the checkpoint once, however the boxes lie.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ...parallel.box import Box
from ..errors import DamageError
from ..files import Files, RangeReader
from ..manifest import Manifest, StoredArray
from .reader import BATCH_BYTES, Raw, Reader, ReadItem, needed_leaves

WINDOW_BYTES = 4 * BATCH_BYTES
Leaves = np.ndarray[Any, np.dtype[np.bool_]]
Bytes = np.ndarray[Any, np.dtype[np.uint8]]


class SharedReader(Reader):
    """A Reader of all ranks of a process group, whose `read` they call together. The group must be able to use the CPU."""

    def __init__(self, files: Files, manifest: Manifest, group: dist.ProcessGroup) -> None:
        super().__init__(files, manifest)
        self.group = group
        self._fault: DamageError | None = None

    def items(self, wanted: Sequence[tuple[StoredArray, Box]], targets: Sequence[Raw] = ()) -> list[list[ReadItem]]:
        """See Reader. A rank that meets damage in an index needs nothing more, and raises once it has served the others."""
        try:
            return super().items(wanted, targets)
        except DamageError as error:
            self._fault = self._fault or error
            return [[] for _ in wanted]

    def _missing_indexes(self, wanted: Sequence[tuple[StoredArray, Box]]) -> list[int]:
        try:
            return super()._missing_indexes(wanted)
        except DamageError as error:  # of the manifest: the others read the indexes all the same
            self._fault = self._fault or error
            return []

    def fetch(self, items: list[ReadItem]) -> Iterator[tuple[ReadItem, Bytes, int]]:
        """See Reader. A rank that meets damage goes on serving the others, which learn of it, and raises at the end."""
        items = sorted(items, key=lambda item: (item.file, item.stop))
        everyone: list[Any] = [None] * self.group.size()
        dist.all_gather_object(everyone, self._needs(items), group=self.group)
        at = 0
        me = self.group.rank()
        for number in sorted(everyone[me]):
            size = self.manifest.files[number].bytes
            count = -(-size // self.manifest.leaf_bytes)
            needs = [unpacked(n[number], count) if number in n else None for n in everyone]
            mine = unpacked(everyone[me][number], count)
            with contextlib.ExitStack() as stack:
                reader = _OpenedToRead(functools.partial(self.open, number), stack)
                # The tail before the window keeps what items that end in it began with.
                buffer = np.empty(min(BATCH_BYTES + WINDOW_BYTES, size + BATCH_BYTES), np.uint8)
                for start in range(0, size, WINDOW_BYTES):
                    stop = min(start + WINDOW_BYTES, size)
                    if not mine[start // self.manifest.leaf_bytes : -(-stop // self.manifest.leaf_bytes)].any():
                        continue  # this rank neither needs nor reads anything here; of a header only the first windows count
                    buffer[:BATCH_BYTES] = buffer[WINDOW_BYTES : WINDOW_BYTES + BATCH_BYTES] if start else 0
                    self._exchange(number, reader, start, stop, needs, buffer[BATCH_BYTES:])
                    while at < len(items) and items[at].file == number and items[at].stop <= stop:
                        item = items[at]
                        self.traffic.wanted += len(item.run_starts) * item.run_bytes
                        if self._fault is None:
                            yield item, buffer, start - BATCH_BYTES
                        at += 1
        if self._fault is not None:
            raise self._fault

    def _needs(self, items: list[ReadItem]) -> dict[int, bytes]:
        """For each file, which leaves this rank needs, packed. items: in the order of their files."""
        size = {item.file: self.manifest.files[item.file].bytes for item in items}
        return {
            number: zlib.compress(
                np.packbits(needed_leaves(list(group), 0, size[number], self.manifest.leaf_bytes)).tobytes(), 1
            )
            for number, group in itertools.groupby(items, key=lambda item: item.file)
        }

    def _exchange(self, number: int, reader: Any, start: int, stop: int, needs: list[Leaves | None], window: Bytes) -> None:
        """Fill the leaves of this window that this rank needs, by reading or from others."""
        leaf, me = self.manifest.leaf_bytes, self.group.rank()
        low, high = start // leaf, -(-stop // leaf)
        wanted = np.stack([n[low:high] if n is not None else np.zeros(high - low, bool) for n in needs])
        readers = deal(wanted)
        own = readers == me
        self._try(self._read_checked, number, reader, start, stop, own, window)
        works: list[Any] = []
        arrivals: list[tuple[Leaves, torch.Tensor]] = []
        for other in range(len(needs)):
            if other == me:
                continue
            give, take = own & wanted[other], (readers == other) & wanted[me]
            if give.any():
                message = torch.from_numpy(np.concatenate([_gather(window, give, leaf, stop - start), self._flag()]))
                works.append(self.group.send([message], other, 0))
            if take.any():
                message = torch.empty(int(_lengths(take, leaf, stop - start).sum()) + 1, dtype=torch.uint8)
                arrivals.append((take, message))
                works.append(self.group.recv([message], other, 0))
        for work in works:
            work.wait()
        for take, message in arrivals:
            data = message.numpy()
            if data[-1]:
                self._fault = self._fault or DamageError(
                    self.files.label(self.manifest.files[number].name), "the rank that read it for the others found damage"
                )
            _scatter(window, take, leaf, stop - start, data[:-1])

    def _flag(self) -> Bytes:
        return np.array([self._fault is not None], np.uint8)

    def _try(self, action: Callable[..., None], *arguments: Any) -> None:
        try:
            action(*arguments)
        except DamageError as error:
            self._fault = self._fault or error


def unpacked(needs: bytes, count: int) -> Leaves:
    """Unpack a rank's message: which of a file's `count` leaves it needs, as compressed bits."""
    return np.unpackbits(np.frombuffer(zlib.decompress(needs), np.uint8), count=count).astype(bool)


class _OpenedToRead:
    """A file that is opened when something is read of it: of the ranks that need parts, few are dealt some to read."""

    def __init__(
        self, opens: Callable[[], contextlib.AbstractContextManager[RangeReader]], stack: contextlib.ExitStack
    ) -> None:
        """stack: closes it."""
        self._opens = opens
        self._stack = stack
        self._opened: RangeReader | None = None

    def expect(self, offset: int, length: int) -> None:
        """See RangeReader."""
        self._reader().expect(offset, length)

    def fill(self, target: memoryview, offset: int) -> None:
        """See RangeReader."""
        self._reader().fill(target, offset)

    def _reader(self) -> RangeReader:
        if self._opened is None:
            self._opened = self._stack.enter_context(self._opens())
        return self._opened


def deal(wanted: Leaves) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Choose a reader for each leaf of a window among those that want it, in turn by runs of leaves; −1: nobody wants it.

    wanted: (ranks, leaves). Every rank computes the same.
    """
    readers = np.full(wanted.shape[1], -1, np.int64)
    load = np.zeros(wanted.shape[0], np.int64)
    if not wanted.shape[1]:
        return readers
    changes = np.flatnonzero((wanted[:, 1:] != wanted[:, :-1]).any(axis=0)) + 1
    for run in np.split(np.arange(wanted.shape[1]), changes):
        who = np.flatnonzero(wanted[:, run[0]])
        if not len(who):
            continue
        for part in np.array_split(run, min(len(who), len(run))):
            chosen = who[np.argmin(load[who])]
            readers[part] = chosen
            load[chosen] += len(part)
    return readers


def _lengths(leaves: Leaves, leaf: int, size: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Bytes of each chosen leaf of a window of `size` bytes; the last leaf of a file may be shorter."""
    return np.minimum((np.flatnonzero(leaves) + 1) * leaf, size) - np.flatnonzero(leaves) * leaf


def _gather(window: Bytes, leaves: Leaves, leaf: int, size: int) -> Bytes:
    return np.concatenate([window[at * leaf : min((at + 1) * leaf, size)] for at in np.flatnonzero(leaves).tolist()])


def _scatter(window: Bytes, leaves: Leaves, leaf: int, size: int, data: Bytes) -> None:
    position = 0
    for at in np.flatnonzero(leaves).tolist():
        part = window[at * leaf : min((at + 1) * leaf, size)]
        part[...] = data[position : position + len(part)]
        position += len(part)
