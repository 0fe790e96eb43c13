"""The blocks of attention between the pieces that two members of a ring hold. No ranks and no messages here.

Members hold pieces of documents (`zigzag.py`): of each document any number, cut anywhere. Two pieces of a document don't
overlap, and what the later one sees of the earlier one is a full rectangle. So no block between members ever needs a mask, and
a member's own share is plain causal attention inside each document: the pieces of a document lie side by side on a member.

Through a window a rectangle has a mask, whose edge runs along a diagonal: `AttentionBlock.left`. What lies wholly outside of
the window is neither computed nor sent. A member's pieces of one document are then apart: its own share is attention inside
each piece, and rectangles between them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from .zigzag import Piece

Positions = tuple[int, int]
"""Half-open range of positions on a member: [start, stop)."""

RingExchange = Literal["keys", "queries"]
"""Side of attention whose tensors are sent to the holder of the other side."""


@dataclass(frozen=True)
class AttentionBlock:
    """A block in which every query of one span attends to every key of another.

    left  or only to so many keys before its own place, counted as if the last query and the last key had the same one
    """

    queries: Positions
    keys: Positions
    left: int | None = None

    def span(self, ring_exchange: RingExchange) -> Positions:
        """Return the span of one side."""
        return self.keys if ring_exchange == "keys" else self.queries

    def at(self, ring_exchange: RingExchange, start: int) -> AttentionBlock:
        """Return the block with the span of one side beginning elsewhere."""
        first, stop = self.span(ring_exchange)
        span = (start, start + stop - first)
        return replace(self, keys=span) if ring_exchange == "keys" else replace(self, queries=span)


@dataclass(frozen=True)
class PlacedPiece:
    """A piece of a document: where it begins in the rows, its length, and where it lies on the member."""

    document: int
    start: int
    length: int
    at: int


def place_cut_documents(pieces: Sequence[Sequence[Piece]]) -> list[list[PlacedPiece]]:
    """Find where each member's pieces lie on it, without documents of one piece: those concern nobody else."""
    count = Counter(piece.document for member in pieces for piece in member)
    placed: list[list[PlacedPiece]] = []
    for member in pieces:
        at = 0
        placed.append([])
        for piece in member:
            if count[piece.document] > 1:
                placed[-1].append(PlacedPiece(*piece, at))
            at += piece.length
    return placed


def blocks_between(queries: Sequence[PlacedPiece], keys: Sequence[PlacedPiece], window: int | None) -> list[AttentionBlock]:
    """List what the queries' holder computes on the keys' holder's keys, in the order of the positions."""
    of_document: dict[int, list[PlacedPiece]] = {}
    for key in keys:
        of_document.setdefault(key.document, []).append(key)
    blocks: list[AttentionBlock] = []
    for query in queries:
        seen = [key for key in of_document.get(query.document, []) if key.start < query.start]
        if not seen:
            continue
        if window is not None:
            blocks += filter(None, (_through_window(query, key, window) for key in seen))
            continue
        span = (seen[0].at, seen[-1].at + seen[-1].length)
        assert span[1] - span[0] == sum(key.length for key in seen), "the keys of a document lie side by side"
        if blocks and blocks[-1].keys == span and blocks[-1].queries[1] == query.at:
            blocks[-1] = AttentionBlock((blocks[-1].queries[0], query.at + query.length), span)
        else:
            assert not blocks or blocks[-1].keys[1] <= span[0], "no key is needed twice"
            blocks.append(AttentionBlock((query.at, query.at + query.length), span))
    return blocks


def _through_window(query: PlacedPiece, key: PlacedPiece, window: int) -> AttentionBlock | None:
    """Cut a rectangle to the queries that see a key, and to the keys that a query sees; None where that leaves nothing."""
    end = key.start + key.length  # not beyond the first query
    queries = min(query.length, end + window - 1 - query.start)
    hidden = max(0, query.start - window + 1 - key.start)
    if queries <= 0 or hidden >= key.length:
        return None
    left = window - 1 - (query.start + queries - end)
    keys = (key.at + hidden, key.at + key.length)
    return AttentionBlock((query.at, query.at + queries), keys, left if left < keys[1] - keys[0] - 1 else None)


def spans_of(blocks: Sequence[AttentionBlock], ring_exchange: RingExchange = "keys") -> tuple[Positions, ...]:
    """Return the spans of keys (or queries) that these blocks need, ascending, each position once."""
    spans: list[Positions] = []
    for start, stop in sorted(block.span(ring_exchange) for block in blocks):
        if spans and start < spans[-1][1]:
            spans[-1] = (spans[-1][0], max(stop, spans[-1][1]))
        else:
            spans.append((start, stop))
    return tuple(spans)


def from_message_start(
    blocks: Sequence[AttentionBlock], spans: Sequence[Positions], ring_exchange: RingExchange = "keys"
) -> tuple[AttentionBlock, ...]:
    """Count the blocks' keys (or queries) from the start of a message that holds these spans of them."""
    counted: list[AttentionBlock] = []
    for block in blocks:
        first, before = block.span(ring_exchange)[0], 0
        for start, stop in spans:
            if start <= first < stop:
                counted.append(block.at(ring_exchange, before + first - start))
                break
            before += stop - start
    return tuple(counted)
