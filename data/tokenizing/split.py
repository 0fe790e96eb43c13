"""The split of a corpus into training and validation data: pure, whatever the order of the documents.

Whole documents are held out, those with the lowest content hash, as long as that comes near the share that is asked for.
Where it does not (few documents, or very unequal ones), passages are held out: the documents are laid end to end in the order
of their hashes, and a window at the end of each of several equal stretches is held out.

    hash order   |--- document A ---|-- B --|-------- document C --------|
    held out               ####            ####            ####         ####

Copies of a document lie in one place of that order, so that the same text is held out of each. Fill-in-the-middle writes copies
in different orders, and one window is not the same text in each: there no text that has a copy is held out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from ...config.lazy import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

NEAR = 2.0  # whole documents are held out if either side's share is wrong by this factor at most
WINDOW = 1024  # tokens of a window, at least, where so many are held out
WINDOWS = 64  # at most


def is_near(held: int, total: int, share: float) -> bool:
    """Return whether the tokens held out, and those left, are about as many as asked for, and none of both is empty."""
    if not 0 < held < total:
        return False
    return all(1 / NEAR <= found / asked <= NEAR for found, asked in ((held / total, share), (1 - held / total, 1 - share)))


@dataclass(frozen=True)
class Passage:
    """A part [start, stop) of a document's tokens."""

    start: int
    stop: int
    held_out: bool


class PassageSplit:
    """Division of documents into passages, so that a share of all tokens is held out.

    hashes   (documents,) uint64: of each document's content
    lengths  (documents,) int64: its tokens

    copies_differ: whether the tokens of copies differ; then no text that has a copy is held out. Raises ValueError where too
    few tokens are left to hold some out.
    """

    def __init__(
        self, hashes: NDArray[np.uint64], lengths: NDArray[np.int64], share: float, *, copies_differ: bool = False
    ) -> None:
        self._lengths = lengths
        order = np.lexsort((lengths, hashes))
        is_copy = np.diff(hashes[order]) == 0
        if not copies_differ:
            is_copy &= np.diff(lengths[order]) == 0
        group = np.cumsum(np.concatenate([[0], ~is_copy]))
        self._group = np.empty(len(order), np.int64)  # of each document: which text it is a copy of, in hash order
        self._group[order] = group
        self._copies = np.bincount(group)
        firsts = np.searchsorted(group, np.arange(len(self._copies)))
        widths = lengths[order][firsts] * self._copies
        if copies_differ:
            widths[self._copies > 1] = 0  # they have no place on the line
        self._limits = np.concatenate([[0], np.cumsum(widths)])
        if self._limits[-1] < 2:
            fix = "leave out the copies, or use data.validation=0"
            raise ValueError(f"every text has a copy, which fill-in-the-middle orders anew: none can be held out; {fix}")
        self._edges = self._window_edges(round(int(lengths.sum()) * share))

    def _window_edges(self, asked: int) -> NDArray[np.int64]:
        """Return the edges of the windows, by turns a beginning and an end, on the line of tokens. asked: to be held out"""
        total = int(self._limits[-1])
        held = min(max(1, asked), total - 1)
        count = max(1, min(WINDOWS, held // WINDOW))
        stops = np.rint(np.arange(1, count + 1) * (total / count)).astype(np.int64)
        starts = stops - held // count
        slack = min(held, total - held) // count // 8
        return np.stack([self._snapped(starts, slack), self._snapped(stops, slack)], axis=1).ravel()

    def _snapped(self, edges: NDArray[np.int64], slack: int) -> NDArray[np.int64]:
        """Move edges that lie near the edge of a document onto it: short documents stay whole."""
        right = np.minimum(np.searchsorted(self._limits, edges), len(self._limits) - 1)
        left = np.maximum(right - 1, 0)
        below, above = self._limits[left], self._limits[right]
        nearest = np.where(edges - below < above - edges, below, above)
        return np.where(np.abs(nearest - edges) <= slack, nearest, edges)

    def passages(self, document: int) -> Iterator[Passage]:
        """Yield the passages of a document, in order."""
        group, length = int(self._group[document]), int(self._lengths[document])
        first, last = int(self._limits[group]), int(self._limits[group + 1])
        if first == last:
            yield Passage(0, length, False)
            return
        begin = int(np.searchsorted(self._edges, first, side="right"))
        inside = self._edges[begin : int(np.searchsorted(self._edges, last, side="left"))]
        cuts = [0, *((inside - first) // self._copies[group]).tolist(), length]
        held_out = bool(begin % 2)
        for start, stop in pairwise(cuts):
            if start < stop:
                yield Passage(start, stop, held_out)
            held_out = not held_out
