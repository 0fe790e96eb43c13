"""Reading by many ranks at once: each byte that several of them need is read and checked by one, and passed to the others.

All ranks go through the files in the same order, window by window. In each window the leaves that several ranks need are
dealt out among them; what a rank reads for others it sends, one message per pair and window. So a restore on any number of
ranks reads each needed byte of the checkpoint once, however the boxes lie.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ...parallel.box import Box
from ..errors import DamageError, UnreadableError
from ..files import Files
from ..manifest import Manifest, StoredArray
from .items import BATCH_BYTES, Bytes, Raw, ReadItem, needed_leaves
from .reader import Reader, Span

WINDOW_BYTES = 4 * BATCH_BYTES
PASSED_ON = "the rank that read it for the others could not use it"
"""A fault as a rank knows it that only heard of it. Another one says what it is."""
_GOOD, _DAMAGED, _NOT_READ = map(np.uint8, range(3))  # the last byte of a message between ranks
Leaves = np.ndarray[Any, np.dtype[np.bool_]]


class SharedReader(Reader):
    """A Reader of all ranks of a process group, whose `read` they call together. The group must be able to use the CPU."""

    def __init__(self, files: Files, manifest: Manifest, group: dist.ProcessGroup) -> None:
        super().__init__(files, manifest)
        self.group = group
        self._faults: list[Exception] = []  # none or one

    def items(self, wanted: Sequence[tuple[StoredArray, Box]], targets: Sequence[Raw] = ()) -> list[list[ReadItem]]:
        """See Reader. A rank that can't use an index needs nothing more, and raises once it has served the others."""
        try:
            return super().items(wanted, targets)
        except Exception as error:
            self._note(error)
            return [[] for _ in wanted]

    def _missing_indexes(self, wanted: Sequence[tuple[StoredArray, Box]]) -> list[int]:
        try:
            return super()._missing_indexes(wanted)
        except Exception as error:  # of the manifest: the others read the indexes all the same
            self._note(error)
            return []

    def fetch(self, items: list[ReadItem]) -> Iterator[tuple[ReadItem, Bytes, int]]:
        """See Reader. A rank that can't use what it reads serves the others, which learn of it, and raises at the end."""
        items = sorted(items, key=lambda item: (item.file, item.stop))
        everyone: list[Any] = [None] * self.group.size()
        dist.all_gather_object(everyone, self._needs(items), group=self.group)
        at = 0
        me = self.group.rank()
        windows: dict[int, set[int]] = {}  # of each file: those between the first and the last byte of an item
        for item in items:
            windows.setdefault(item.file, set()).update(range(item.start // WINDOW_BYTES, (item.stop - 1) // WINDOW_BYTES + 1))
        for number in sorted(everyone[me]):
            size, leaf = self.manifest.files[number].bytes, self.manifest.leaf_bytes
            count = self.manifest.leaf_count(self.manifest.files[number])
            needs = [unpacked(n[number], count) if number in n else None for n in everyone]
            # The tail before the window keeps what items that end in it began with.
            buffer = np.empty(BATCH_BYTES + min(WINDOW_BYTES, count * leaf), np.uint8)
            for start in range(0, size, WINDOW_BYTES):
                stop = min(start + WINDOW_BYTES, size)
                if start // WINDOW_BYTES not in windows[number]:
                    continue  # this rank neither needs nor reads anything here; of a header only the first windows count
                if start:  # else its memory is not touched: most of thousands of ranks' files have one window
                    buffer[:BATCH_BYTES] = buffer[WINDOW_BYTES : WINDOW_BYTES + BATCH_BYTES]
                self._exchange(number, start, stop, needs, buffer[BATCH_BYTES:])
                while at < len(items) and items[at].file == number and items[at].stop <= stop:
                    item = items[at]
                    self.traffic.wanted += item.bytes
                    if not self._faults:
                        yield item, buffer, start - BATCH_BYTES
                    at += 1
        if self._faults:
            raise self._faults.pop()  # it has no name here: see `errors.py`

    def _needs(self, items: list[ReadItem]) -> dict[int, bytes]:
        """For each file, which leaves this rank needs, packed. items: in the order of their files."""
        size = {item.file: self.manifest.files[item.file].bytes for item in items}
        return {
            number: zlib.compress(
                np.packbits(needed_leaves(list(group), 0, size[number], self.manifest.leaf_bytes)).tobytes(), 1
            )
            for number, group in itertools.groupby(items, key=lambda item: item.file)
        }

    def _exchange(
        self,
        number: int,
        start: int,
        stop: int,
        needs: list[Leaves | None],
        window: Bytes,
    ) -> None:
        """Fill the leaves of this window that this rank needs, by reading or from others."""
        leaf, me = self.manifest.leaf_bytes, self.group.rank()
        low, high = start // leaf, -(-stop // leaf)
        rows = window[: (high - low) * leaf].reshape(-1, leaf)  # of a last leaf that is shorter the rest travels, too
        wanted = np.stack([n[low:high] if n is not None else np.zeros(high - low, bool) for n in needs])
        readers = deal(wanted)
        own = readers == me
        if own.any() and not self._faults:  # after a fault all that it sends is marked
            try:
                self._read_own(number, start, stop, own, window)
            except Exception as error:
                self._note(error)
        works: list[Any] = []
        arrivals: list[tuple[Leaves, torch.Tensor]] = []
        for other in range(len(needs)):
            if other == me:
                continue
            give, take = own & wanted[other], (readers == other) & wanted[me]
            if give.any():
                message = torch.from_numpy(np.append(rows[give], self._mark()))
                works.append(self.group.send([message], other, 0))
            if take.any():
                message = torch.empty(int(take.sum()) * leaf + 1, dtype=torch.uint8)
                arrivals.append((take, message))
                works.append(self.group.recv([message], other, 0))
        for work in works:
            work.wait()
        for take, message in arrivals:
            data = message.numpy()
            if data[-1] != _GOOD:
                label = self.files.label(self.manifest.files[number].title)
                self._note((DamageError if data[-1] == _DAMAGED else UnreadableError)(label, PASSED_ON))
            rows[take] = data[:-1].reshape(-1, leaf)

    def _read_own(self, number: int, start: int, stop: int, own: Leaves, window: Bytes) -> None:
        """Read and check the leaves of a window that fall to this rank, several parts of it at once."""
        leaf = self.manifest.leaf_bytes
        parts = ((at, min(at + BATCH_BYTES, stop)) for at in range(start, stop, BATCH_BYTES))
        spans = [Span(number, a, b, own[(a - start) // leaf : -(-(b - start) // leaf)], window[a - start :]) for a, b in parts]
        for _ in self.read_ahead([span for span in spans if span.needed.any()]):
            pass

    def _mark(self) -> np.uint8:
        """Return the last byte of this rank's messages: what the others can say of what it has read."""
        if not self._faults:
            return _GOOD
        return _DAMAGED if isinstance(self._faults[0], DamageError) else _NOT_READ

    def _note(self, fault: Exception) -> None:
        self._faults = self._faults or [fault]


def unpacked(needs: bytes, count: int) -> Leaves:
    """Unpack a rank's message: which of a file's `count` leaves it needs, as compressed bits."""
    return np.unpackbits(np.frombuffer(zlib.decompress(needs), np.uint8), count=count).astype(bool)


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
