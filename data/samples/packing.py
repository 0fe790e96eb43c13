"""Packing: how documents of any length become samples of one length. S: seq_len."""

from __future__ import annotations

import os
from bisect import bisect_left, insort
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...config.cache import build_once
from ...config.lazy import numpy as np
from ..batch import IGNORED, Sample
from ..shards.reader import TokenShards, positions_of
from ..version import NEWEST

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Concatenated:
    """Concatenate and split: sample k reads tokens [kS, kS+S) and predicts [kS+1, kS+S+1), across documents.

    document_mask  number the documents within each sample, so that attention stays inside them, and take the loss off
                   the position before a document's first token
    padded         where there is no whole sample, pad the incomplete one

    The last, incomplete sample is dropped. Raises ValueError where there is not even one.
    """

    def __init__(self, shards: TokenShards, seq_len: int, document_mask: bool = False, padded: bool = False) -> None:
        self.seq_len = seq_len
        self.vocabulary = shards.vocabulary
        self._shards = shards
        self._document_mask = document_mask
        self._filled = min(seq_len, shards.tokens - 1) if padded else seq_len  # positions of a sample that have a target
        self._count = (shards.tokens - 1) // max(1, self._filled)
        if self._count < 1:
            text = f"data.seq_len: a sample of {seq_len} takes one token more, and {shards.folder} has {shards.tokens}"
            raise ValueError(text)

    def __len__(self) -> int:
        return self._count

    @property
    def padding(self) -> float:
        """Share of all positions that is padding, in [0, 1)."""
        return 1 - self._filled / self.seq_len

    def __getitem__(self, index: int) -> Sample:
        """Return the sample at a position in [0, len)."""
        if not 0 <= index < self._count:
            raise IndexError(f"sample {index} is outside [0, {self._count})")
        if self._filled < self.seq_len:
            return self._padded(self._shards.read(0, self._filled + 1))
        whole = self.part(index, 0, self.seq_len)
        if not self._document_mask:
            return whole
        start = index * self.seq_len
        ends = self._shards.ends_within(start, start + self.seq_len) - start
        return replace(whole, documents=_number_documents(ends, self.seq_len))

    def lengths(self, index: int) -> NDArray[np.int64]:
        """Return the lengths of a sample's documents, without padding; of the whole sample where attention crosses them."""
        start = index * self.seq_len
        if not self._document_mask:
            return np.array([self.seq_len], np.int64)
        filled = self.seq_len if self._filled == self.seq_len else self._filled + 1
        ends = self._shards.ends_within(start, start + filled) - start
        return np.diff(ends if len(ends) and ends[-1] == filled else np.append(ends, filled), prepend=0)

    def part(self, index: int, start: int, stop: int) -> Sample:
        """Return the tokens and targets of positions [start, stop) of a sample."""
        if self._filled < self.seq_len:
            return self[index].part(start, stop)
        start, stop = index * self.seq_len + start, index * self.seq_len + stop
        tokens = self._shards.read(start, stop + 1)
        targets = self._targets(tokens, start)
        if self._document_mask:
            targets = targets.copy()
            targets[self._shards.ends_within(start, stop) - start - 1] = IGNORED
        return Sample(tokens[:-1], targets)

    def _targets(self, tokens: NDArray[np.int64], start: int) -> NDArray[np.int64]:
        """Return the targets of the tokens that were read from `start` on: those that carry loss."""
        if not self._shards.masked:
            return tokens[1:]
        learned = self._shards.learned(np.arange(start + 1, start + len(tokens)))
        return np.where(learned, tokens[1:], IGNORED)

    def _padded(self, found: NDArray[np.int64]) -> Sample:
        """Make the only sample of fewer tokens than it has positions."""
        tokens = np.full(self.seq_len + 1, self._shards.manifest.end_of_document or 0, np.int64)
        tokens[: len(found)] = found
        targets = np.full(self.seq_len, IGNORED, np.int64)
        targets[: len(found) - 1] = self._targets(found, 0)
        if not self._document_mask:
            return Sample(tokens[:-1], targets)
        ends = self._shards.ends_within(0, len(found))
        targets[ends - 1] = IGNORED
        return Sample(tokens[:-1], targets, _number_documents(np.union1d(ends, len(found)), self.seq_len))


def _number_documents(ends: NDArray[np.int64], length: int) -> NDArray[np.int64]:
    """Number the document at each of `length` positions, from where documents end (sorted, in [1, length])."""
    documents = np.zeros(length, np.int64)
    documents[ends[ends < length]] = 1
    return np.cumsum(documents)


def best_fit(lengths: NDArray[np.int64], capacity: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pack pieces of at most `capacity` into bins by best-fit decreasing: longest first, each into the fullest bin it fits.

    Returns the pieces' numbers in the order of their bins, (pieces,), and where each bin begins in it, (bins + 1,).

    Pieces of one length are placed together: the fullest bin that fits takes ⌊free / length⌋ of them, and so does every
    bin with the same free space. So the work is a few numpy calls for every pair of a length and a free space that meet,
    whatever the number of pieces. Uses at most 11/9 of the least number of bins, + 6/9 (Dósa 2007).
    """
    assert not len(lengths) or 1 <= lengths.min() <= lengths.max() <= capacity
    order = np.argsort(-lengths, kind="stable")
    sizes, firsts = np.unique(-lengths[order], return_index=True)
    bin_of = np.empty(len(lengths), np.int64)
    rooms: list[int] = []  # sorted, without repetition: free positions of bins that have any
    bins_with: dict[int, list[NDArray[np.int64]]] = {}
    bins = 0

    def put(which: NDArray[np.int64], room: int) -> None:
        if len(which) and room:
            if room not in bins_with:
                insort(rooms, room)
            bins_with.setdefault(room, []).append(which)

    for size, pieces in zip((-sizes).tolist(), np.split(order, firsts[1:]), strict=True):
        while len(pieces):
            at = bisect_left(rooms, size)
            if at < len(rooms):
                room = rooms.pop(at)
                open_bins = np.concatenate(bins_with.pop(room))
            else:
                room = capacity
                needed = -(-len(pieces) // (capacity // size))
                open_bins = np.arange(bins, bins + needed)
                bins += needed
            each = room // size
            filled = min(len(open_bins), len(pieces) // each)
            taken = filled * each
            bin_of[pieces[:taken]] = np.repeat(open_bins[:filled], each)
            put(open_bins[:filled], room - each * size)
            pieces, open_bins = pieces[taken:], open_bins[filled:]
            if len(open_bins) and len(pieces):  # fewer pieces are left than one more bin would take
                bin_of[pieces] = open_bins[0]
                put(open_bins[:1], room - len(pieces) * size)
                pieces, open_bins = pieces[:0], open_bins[1:]
            put(open_bins, room)
    return np.argsort(bin_of, kind="stable"), np.searchsorted(np.sort(bin_of), np.arange(bins + 1))


def map_array(path: Path) -> NDArray[Any]:
    """Map an array that `np.save` has written. `np.load` would open the file three times, on every rank of a run."""
    with path.open("rb") as file:
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError(f"{path} is not as `np.save` writes it")
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
        assert not fortran_order
        return np.asarray(np.memmap(file, dtype, "r", file.tell(), shape))


class BestFit:
    """Best-fit packing ("Fewer Truncations", arXiv 2404.10830).

    Only documents longer than S are cut, into pieces of S and a rest. The pieces fill samples by best-fit decreasing, and
    free positions are padding. A piece that is continued in another sample still predicts its next token. The last
    position of a document, and padding, carry no loss. A rest of one token would have no target: it is left out, and is still
    the target of the piece before it.

    document_mask  as in `Concatenated`; padding has a document of its own
    cache          folder for the table of pieces, which is built once
    version        of the rules (`version.py`); under version 1 rests of one token are in samples
    """

    def __init__(self, shards: TokenShards, seq_len: int, document_mask: bool, cache: Path, version: int = NEWEST) -> None:
        self._version = version
        self.seq_len = seq_len
        self.vocabulary = shards.vocabulary
        self._shards = shards
        self._document_mask = document_mask
        self._padding = shards.manifest.end_of_document or 0
        kind = "bestfit" if version == 1 else f"bestfit{version}"
        folder = cache / "packings" / f"{kind}-{seq_len}-{shards.fingerprint[:16]}"
        build_once(folder, self._build)
        self._starts, self._lengths, self._bins = (map_array(folder / f"{name}.npy") for name in ("starts", "lengths", "bins"))

    def _build(self, folder: Path) -> None:
        documents = self._shards.document_lengths()
        counts = -(-documents // self.seq_len)
        number = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)  # of the piece in its document
        starts = np.repeat(np.cumsum(documents) - documents, counts) + number * self.seq_len
        lengths = np.minimum(np.repeat(documents, counts) - number * self.seq_len, self.seq_len)
        if self._version > 1:
            has_target = (lengths > 1) | (number < np.repeat(counts, counts) - 1)
            starts, lengths = starts[has_target], lengths[has_target]
        if not len(lengths):
            raise ValueError(f"no document of {self._shards.folder} has two tokens or more, and a sample takes two")
        order, bins = best_fit(lengths, self.seq_len)
        for name, table in (("starts", starts[order]), ("lengths", lengths[order]), ("bins", bins)):
            with (folder / f"{name}.npy").open("wb") as file:
                np.save(file, table)
                file.flush()
                os.fsync(file.fileno())

    def __len__(self) -> int:
        return len(self._bins) - 1

    @property
    def padding(self) -> float:
        """Share of all positions that is padding, in [0, 1)."""
        return 1 - int(self._lengths.sum()) / (len(self) * self.seq_len)

    def __getitem__(self, index: int) -> Sample:
        """Return the sample at a position in [0, len)."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} is outside [0, {len(self)})")
        whole = self.part(index, 0, self.seq_len)
        if not self._document_mask:
            return whole
        return replace(whole, documents=_number_documents(np.cumsum(self._pieces(index)[1]), self.seq_len))

    def lengths(self, index: int) -> NDArray[np.int64]:
        """Return the lengths of a sample's documents, without padding; of the whole sample where attention crosses them."""
        return self._pieces(index)[1] if self._document_mask else np.array([self.seq_len], np.int64)

    def part(self, index: int, start: int, stop: int) -> Sample:
        """Return the tokens and targets of positions [start, stop) of a sample."""
        starts, lengths = self._pieces(index)
        ends = np.cumsum(lengths)
        begins = ends - lengths
        first, last = np.maximum(begins, start), np.minimum(ends, stop + 1)
        read = last > first
        tokens = np.full(stop + 1 - start, self._padding, np.int64)
        filled = int(np.clip(ends[-1] - start, 0, len(tokens)))
        if filled:
            tokens[:filled] = self._shards.read_pieces((starts + first - begins)[read], (last - first)[read])
        targets = tokens[1:].copy()
        if self._shards.masked and filled:
            places = positions_of((starts + first - begins)[read], (last - first)[read])
            targets[: filled - 1][~self._shards.learned(places)[1:]] = IGNORED
        targets[ends[(start < ends) & (ends <= stop)] - 1 - start] = IGNORED
        targets[filled:] = IGNORED
        end = int(starts[0]) + self.seq_len
        if stop == self.seq_len == lengths[0] and not len(self._shards.ends_within(end - 1, end)):
            following = self._shards.read(end, end + 1)[0]  # only a piece as long as a sample is continued elsewhere
            targets[-1] = following if self._shards.learned(np.array([end]))[0] else IGNORED
        return Sample(tokens[:-1], targets)

    def _pieces(self, index: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return where the pieces of a sample begin in the shards, and their lengths."""
        first, last = int(self._bins[index]), int(self._bins[index + 1])
        return self._starts[first:last], self._lengths[first:last]


PACKINGS = ("concat", "bestfit")


def pack(
    shards: TokenShards,
    packing: str,
    seq_len: int,
    document_mask: bool,
    cache: Path,
    version: int = NEWEST,
    padded: bool = False,
) -> Concatenated | BestFit:
    """Pack a shard folder into samples as `data.packing` says. padded: where there is no whole sample, pad one."""
    if packing == "bestfit":
        return BestFit(shards, seq_len, document_mask, cache, version)
    return Concatenated(shards, seq_len, document_mask, padded)
