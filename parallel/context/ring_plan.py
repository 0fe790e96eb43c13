"""The plan of a ring: the blocks of attention that each pair of members computes, and the keys that they send. No ranks here.

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
from functools import lru_cache

from .zigzag import Piece, cut_document, deal_pieces

Span = tuple[int, int]
"""Half-open range of positions on a member: [start, stop)."""


@dataclass(frozen=True)
class AttentionBlock:
    """A block in which every query of one span attends to every key of another.

    left  or only to so many keys before its own place, counted as if the last query and the last key had the same one
    """

    queries: Span
    keys: Span
    left: int | None = None


@dataclass(frozen=True)
class Receive:
    """Keys that a member receives: from whom, how many, and what it computes on them. Blocks count from the message's start."""

    member: int
    length: int
    blocks: tuple[AttentionBlock, ...]


@dataclass(frozen=True)
class Send:
    """Keys that a member sends: to whom, and which spans of its own, in the order of the message."""

    member: int
    keys: tuple[Span, ...]

    @property
    def length(self) -> int:
        """Length of the message."""
        return sum(stop - start for start, stop in self.keys)


@dataclass(frozen=True)
class Step:
    """One exchange at distance t around each ring that a member belongs to, all its messages at once."""

    receives: tuple[Receive, ...]
    sends: tuple[Send, ...]


@dataclass(frozen=True)
class RingPlan:
    """A member's part in one attention: its own sequences in order (their lengths on this member), then N − 1 steps.

    own_blocks  rectangles between its own pieces of a document, which a window takes apart
    """

    own: tuple[int, ...]
    steps: tuple[Step, ...]
    own_blocks: tuple[AttentionBlock, ...] = ()


@dataclass(frozen=True)
class _PlacedPiece:
    """A piece of a document: where it begins in the rows, its length, and where it lies on the member."""

    document: int
    start: int
    length: int
    at: int


@lru_cache(maxsize=256)
def plan_whole(length: int, size: int, index: int, window: int | None = None) -> RingPlan:
    """Plan for rows that are one document each; spans hold for every row of a batch alike."""
    return plan_exchange(deal_pieces((0, length), length, size), index, window)


@lru_cache(maxsize=64)
def plan_documents(cu_seqlens: tuple[int, ...], length: int, size: int, index: int, window: int | None = None) -> RingPlan:
    """Plan for packed rows, and remember the plan: every layer asks for that of the same micro-batch."""
    return plan_exchange(deal_pieces(cu_seqlens, length, size), index, window)


def plan_exchange(pieces: Sequence[Sequence[Piece]], index: int, window: int | None = None) -> RingPlan:
    """Plan the part of member `index` in an attention whose members hold these pieces, each in its order.

    Pieces of one document lie side by side on a member, ascending.
    window: positions that a query sees, its own included; None: all before it.
    """
    size = len(pieces)
    placed = _place_cut_documents(pieces)
    steps: list[Step] = []
    for distance in range(1, size):
        source, target = (index - distance) % size, (index + distance) % size
        seen = _blocks(placed[index], placed[source], window)
        spans = _message(seen)
        receive = Receive(source, sum(stop - start for start, stop in spans), _from_message_start(seen, spans))
        send = Send(target, _message(_blocks(placed[target], placed[index], window)))
        steps.append(Step((receive,) if receive.length else (), (send,) if send.length else ()))
    own_blocks = () if window is None else tuple(_blocks(placed[index], placed[index], window))
    return RingPlan(_own_lengths(pieces[index], apart=window is not None), tuple(steps), own_blocks)


@lru_cache(maxsize=64)
def plan_rings(rings: tuple[int, ...], index: int, window: int | None = None) -> RingPlan:
    """Plan a row whose first documents are shared, each with a run of members of its own, and whose others are whole.

    rings: the number of all members, that of shared documents, (length, first member, number of members) of each, then the
    lengths of whole ones. Behind the last member comes the first. index: of this member among all. Members that share a
    document must hold it in rows that they run at the same time.
    In the t-th exchange each pair of members at distance t in a ring exchanges its keys, in the order of the documents.
    """
    members, count = rings[:2]
    shared = [rings[at : at + 3] for at in range(2, 2 + 3 * count, 3)]
    own: list[int] = []
    own_blocks: list[AttentionBlock] = []
    steps: list[Step] = []
    at = 0
    for length, first, size in shared:
        plan = _plan_document(length, size, (index - first) % members, window)
        own += plan.own
        own_blocks += (_shifted(block, at, at) for block in plan.own_blocks)
        steps += [Step((), ())] * (len(plan.steps) - len(steps))
        for number, step in enumerate(plan.steps):
            receives = (
                replace(
                    each, member=(first + each.member) % members, blocks=tuple(_shifted(block, at, 0) for block in each.blocks)
                )
                for each in step.receives
            )
            sends = (
                Send((first + each.member) % members, tuple((at + start, at + stop) for start, stop in each.keys))
                for each in step.sends
            )
            steps[number] = Step((*steps[number].receives, *receives), (*steps[number].sends, *sends))
        at += sum(plan.own)
    return RingPlan((*own, *rings[2 + 3 * count :]), tuple(steps), tuple(own_blocks))


@lru_cache(maxsize=256)
def _plan_document(length: int, size: int, index: int, window: int | None) -> RingPlan:
    return plan_exchange(cut_document(length, size), index, window)


def _shifted(block: AttentionBlock, queries: int, keys: int) -> AttentionBlock:
    """Move a block along the member's positions."""
    moved = (queries + block.queries[0], queries + block.queries[1]), (keys + block.keys[0], keys + block.keys[1])
    return replace(block, queries=moved[0], keys=moved[1])


def _own_lengths(pieces: Sequence[Piece], *, apart: bool) -> tuple[int, ...]:
    """List the lengths of a member's documents. apart: whether each piece counts by itself."""
    lengths: list[int] = []
    latest = -1
    for piece in pieces:
        if piece.document == latest and not apart:
            lengths[-1] += piece.length
        else:
            lengths.append(piece.length)
        latest = piece.document
    return tuple(lengths)


def _place_cut_documents(pieces: Sequence[Sequence[Piece]]) -> list[list[_PlacedPiece]]:
    """Find where each member's pieces lie on it, without documents of one piece: those concern nobody else."""
    count = Counter(piece.document for member in pieces for piece in member)
    placed: list[list[_PlacedPiece]] = []
    for member in pieces:
        at = 0
        placed.append([])
        for piece in member:
            if count[piece.document] > 1:
                placed[-1].append(_PlacedPiece(*piece, at))
            at += piece.length
    return placed


def _blocks(queries: Sequence[_PlacedPiece], keys: Sequence[_PlacedPiece], window: int | None) -> list[AttentionBlock]:
    """List what the queries' holder computes on the keys' holder's keys, in the order of the positions."""
    of_document: dict[int, list[_PlacedPiece]] = {}
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


def _through_window(query: _PlacedPiece, key: _PlacedPiece, window: int) -> AttentionBlock | None:
    """Cut a rectangle to the queries that see a key, and to the keys that a query sees; None where that leaves nothing."""
    end = key.start + key.length  # not beyond the first query
    queries = min(query.length, end + window - 1 - query.start)
    hidden = max(0, query.start - window + 1 - key.start)
    if queries <= 0 or hidden >= key.length:
        return None
    left = window - 1 - (query.start + queries - end)
    keys = (key.at + hidden, key.at + key.length)
    return AttentionBlock((query.at, query.at + queries), keys, left if left < keys[1] - keys[0] - 1 else None)


def _message(blocks: Sequence[AttentionBlock]) -> tuple[Span, ...]:
    """Return the spans of keys that these blocks need, ascending, each key once."""
    spans: list[Span] = []
    for start, stop in sorted(block.keys for block in blocks):
        if spans and start < spans[-1][1]:
            spans[-1] = (spans[-1][0], max(stop, spans[-1][1]))
        else:
            spans.append((start, stop))
    return tuple(spans)


def _from_message_start(blocks: Sequence[AttentionBlock], spans: Sequence[Span]) -> tuple[AttentionBlock, ...]:
    """Count the blocks' keys from the start of a message that holds these spans of them."""
    moved: list[AttentionBlock] = []
    for block in blocks:
        before = 0
        for start, stop in spans:
            if start <= block.keys[0] < stop:
                at = before + block.keys[0] - start
                moved.append(replace(block, keys=(at, at + block.keys[1] - block.keys[0])))
                break
            before += stop - start
    return tuple(moved)
