"""Positions of packed rows that each member of a ring holds: long documents zig-zag over all members, short ones whole on one.

Under a causal mask a document of n positions has n²/2 score entries, most of them in its late positions. Cut into 2N pieces, of
which member i of N takes pieces i and 2N − 1 − i (zig-zag; ByteScale, arXiv 2502.21231), every member has the same number. That
holds for each document, not for a row of several: the late half of a row isn't dearer than the early half. So each long
document is cut by itself. A short document stays whole on the member with the fewest entries, and no message is sent for it.
What fits nowhere whole fills the room that is left, in contiguous pieces.

Every member holds the same number of positions of each row, to within rounding where 2N does not divide the row.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from heapq import heapify, heappop, heappush
from itertools import accumulate, pairwise
from typing import NamedTuple

BLOCK_ENTRIES = 1 << 20  # score entries that take as long as starting one more block: some 20 µs of an H200 at 32 heads of 128
SHORT_SHARES = (1, 2, 4, 8, 16)  # a document is short up to a member's positions divided by one of these


class Piece(NamedTuple):
    """Positions [start, start + length) of rows laid end to end, all of one document."""

    document: int
    start: int
    length: int


@lru_cache(maxsize=64)
def deal_pieces(cu_seqlens: tuple[int, ...], length: int, size: int) -> tuple[tuple[Piece, ...], ...]:
    """Deal rows of `length` laid end to end to `size` members; return each member's pieces in its order.

    cu_seqlens: where documents begin, ascending, from 0 to rows × length; every row's end is among them.
    A member holds row after row, and in a row the pieces ascend: those of one document lie side by side.
    """
    held: list[list[Piece]] = [[] for _ in range(size)]
    row: list[Piece] = []
    for document, (start, stop) in enumerate(pairwise(cu_seqlens)):
        if stop > start:
            row.append(Piece(document, start, stop - start))
        if stop % length == 0 and row:
            for member, pieces in enumerate(_deal_row(row, length, size)):
                held[member] += pieces
            row = []
    return tuple(map(tuple, held))


def cut_document(length: int, size: int) -> list[list[Piece]]:
    """Cut one document over `size` members: the zig-zag. No member holds more than ⌈length / size⌉ positions."""
    slots = 2 * size
    base, over = divmod(length, slots)
    given = [*range(size), *reversed(range(size, slots))]  # what is left over goes to each member once, then once more
    parts = [base] * slots
    for slot in given[:over]:
        parts[slot] += 1
    ends = list(accumulate(parts, initial=0))
    pieces = [Piece(0, start, stop - start) for start, stop in pairwise(ends)]
    return [[piece for piece in (pieces[i], pieces[slots - 1 - i]) if piece.length] for i in range(size)]


def _deal_row(documents: Sequence[Piece], length: int, size: int) -> list[list[Piece]]:
    """Try several lengths up to which documents stay whole, and keep the deal whose slowest member is fastest."""
    deals: list[_Deal] = []
    latest = -1
    for divisor in SHORT_SHARES:
        whole = [document for document in documents if document.length * size * divisor <= length]
        if len(whole) == latest:
            continue
        latest = len(whole)
        deal = _Deal(length, size)
        deal.cut_each([document for document in documents if document.length * size * divisor > length])
        deal.fill_room(deal.place_whole(whole))
        deals.append(deal)
        if deal.cost() <= 1.01 * deal.mean_entries():
            break
    best = min(deals, key=_Deal.cost)
    return [sorted(pieces) for pieces in best.held]


class _Deal:
    """A row being dealt: the pieces of each member, its room, and the score entries and cut documents that it has so far."""

    def __init__(self, length: int, size: int) -> None:
        self._slots = 2 * size
        self.held: list[list[Piece]] = [[] for _ in range(size)]
        self._entries = [0] * size
        self._cut: list[set[int]] = [set() for _ in range(size)]
        self._room = [0] * size
        for slot, part in enumerate(self._parts(length, 0)):
            self._room[self._member(slot)] += part

    def cost(self) -> int:
        """Return the score entries of the slowest member, the start of its blocks included."""
        steps = len(self.held) - 1
        return max(own + BLOCK_ENTRIES * steps * len(cut) for own, cut in zip(self._entries, self._cut, strict=True))

    def mean_entries(self) -> float:
        """Return the score entries of a member if all had the same number."""
        return sum(self._entries) / len(self._entries)

    def cut_each(self, documents: Sequence[Piece]) -> None:
        """Cut each of these documents into 2N pieces, the zig-zag."""
        dealt = 0
        for document in documents:
            done = 0
            for slot, part in enumerate(self._parts(document.length, dealt)):
                self._give(self._member(slot), document, done, part)
                done += part
            dealt += document.length

    def place_whole(self, documents: Sequence[Piece]) -> list[Piece]:
        """Give each document, the longest first, to the member with the fewest entries; return those that fit nowhere."""
        lightest = [(entries, member) for member, entries in enumerate(self._entries)]
        heapify(lightest)
        homeless: list[Piece] = []
        for document in sorted(documents, key=lambda each: (-each.length, each.start)):
            full: list[tuple[int, int]] = []
            while lightest and self._room[lightest[0][1]] < document.length:
                full.append(heappop(lightest))
            if lightest:
                _, member = heappop(lightest)
                self._give(member, document, 0, document.length)
                heappush(lightest, (self._entries[member], member))
            else:
                homeless.append(document)
            for each in full:
                heappush(lightest, each)
        return homeless

    def fill_room(self, documents: Sequence[Piece]) -> None:
        """Lay these documents end to end into the room left; their late pieces go to members with fewer entries."""
        members = sorted(range(len(self.held)), key=lambda member: -self._entries[member])
        following = iter(members)
        member = next(following)
        for document in documents:
            done = 0
            while done < document.length:
                while not self._room[member]:
                    member = next(following)
                part = min(self._room[member], document.length - done)
                self._give(member, document, done, part)
                done += part

    def _parts(self, length: int, before: int) -> list[int]:
        """Cut a length into 2N parts. What is left over goes to one part each, in turn after `before` positions cut so."""
        base, over = divmod(length, self._slots)
        first = before % self._slots
        return [base + ((slot - first) % self._slots < over) for slot in range(self._slots)]

    def _member(self, slot: int) -> int:
        return min(slot, self._slots - 1 - slot)

    def _give(self, member: int, document: Piece, offset: int, length: int) -> None:
        if length:
            self.held[member].append(Piece(document.document, document.start + offset, length))
            self._entries[member] += length * (2 * offset + length + 1) // 2
            self._room[member] -= length
            if length < document.length:
                self._cut[member].add(document.document)
