"""The plan of a zig-zag ring: the positions of each member, and the blocks of attention that each pair computes. No ranks here.

A row of `length` positions is cut into 2N parts; member i of N holds parts i and 2N − 1 − i, so that under a causal mask
every member has the same area to compute (zig-zag; ByteScale, arXiv 2502.21231, "dist-attention"). Sequences (documents)
may begin and end anywhere in a row. Two different parts then share at most one sequence, and what the later part sees of
the earlier one is a full rectangle: the end of the earlier part by the beginning of the later one. So no block between
members ever needs a mask, and a member's own share is plain causal attention inside each sequence.

Through a window a rectangle has a mask, whose edge runs along a diagonal: `AttentionBlock.left`. What lies wholly outside of
the window is neither computed nor sent. A member's two parts are then apart: its own share is attention inside each part, and
rectangles between the two.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

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
class Step:
    """One exchange at distance t around the ring: a member receives from `source` and sends to `target`.

    blocks    what this member computes on the keys it receives; their `keys` count from the start of the message
    received  length of the message from the source
    keys      the spans of its own keys that the target needs, in the order of the message
    """

    source: int
    blocks: tuple[AttentionBlock, ...]
    received: int
    target: int
    keys: tuple[Span, ...]


@dataclass(frozen=True)
class RingPlan:
    """A member's part in one attention: its own sequences in order (their lengths on this member), then N − 1 steps.

    own_blocks  rectangles between its own parts, which a window takes apart
    """

    own: tuple[int, ...]
    steps: tuple[Step, ...]
    own_blocks: tuple[AttentionBlock, ...] = ()


@dataclass(frozen=True)
class _SequencePart:
    """The part of a sequence inside one part of a row: where it begins in the whole, and where it lies on the member."""

    sequence: int
    start: int
    length: int
    at: int


def held(length: int, size: int, index: int, rows: int = 1) -> list[range]:
    """List the positions that member `index` of `size` holds, in its order, of rows of `length` laid end to end."""
    ranges: list[range] = []
    for row in range(rows):
        for part in (index, 2 * size - 1 - index):
            start, stop = part * length // (2 * size), (part + 1) * length // (2 * size)
            ranges.append(range(row * length + start, row * length + stop))
    return ranges


@lru_cache(maxsize=256)
def plan_whole(length: int, size: int, index: int, window: int | None = None) -> RingPlan:
    """Plan for rows that are one sequence each; spans hold for every row of a batch alike."""
    return plan_ring([0, length], length, size, index, window)


@lru_cache(maxsize=64)
def plan_documents(cu_seqlens: tuple[int, ...], length: int, size: int, index: int, window: int | None = None) -> RingPlan:
    """Call `plan_ring` and remember the plan: every layer asks for the plan of the same micro-batch."""
    return plan_ring(cu_seqlens, length, size, index, window)


def plan_ring(cu_seqlens: Sequence[int], length: int, size: int, index: int, window: int | None = None) -> RingPlan:
    """Plan the part of member `index` of `size` for rows of `length` laid end to end, with these sequences.

    cu_seqlens: ascending, from 0 to rows × length, and every row's end is among them.
    window: positions that a query sees, its own included; None: all before it.
    """
    rows = cu_seqlens[-1] // length
    ranges = [held(length, size, member, rows) for member in range(size)]
    pieces = [_edge_pieces(member_ranges, cu_seqlens) for member_ranges in ranges]
    steps: list[Step] = []
    for distance in range(1, size):
        source, target = (index - distance) % size, (index + distance) % size
        received = _blocks(pieces[index], pieces[source], window)
        spans = _message(received)
        steps.append(
            Step(
                source=source,
                blocks=_from_message_start(received, spans),
                received=sum(stop - start for start, stop in spans),
                target=target,
                keys=_message(_blocks(pieces[target], pieces[index], window)),
            )
        )
    own_blocks = () if window is None else tuple(_blocks(pieces[index], pieces[index], window))
    return RingPlan(_own_lengths(ranges[index], cu_seqlens, apart=window is not None), tuple(steps), own_blocks)


def _own_lengths(ranges: Sequence[range], cu_seqlens: Sequence[int], *, apart: bool) -> tuple[int, ...]:
    """List the lengths of a member's sequences. apart: whether its parts are apart, so that one in both counts as two."""
    lengths: list[int] = []
    latest = -1
    for positions in ranges:
        at, latest = positions.start, -1 if apart else latest
        while at < positions.stop:
            sequence = bisect_right(cu_seqlens, at) - 1
            stop = min(positions.stop, cu_seqlens[sequence + 1])
            if sequence == latest:
                lengths[-1] += stop - at
            else:
                lengths.append(stop - at)
            at, latest = stop, sequence
    return tuple(lengths)


def _edge_pieces(ranges: Sequence[range], cu_seqlens: Sequence[int]) -> list[_SequencePart]:
    """Find the first and the last sequence of each part: the others lie wholly inside it and concern nobody else."""
    pieces: list[_SequencePart] = []
    at = 0
    for positions in ranges:
        if positions:
            edges = {bisect_right(cu_seqlens, position) - 1 for position in (positions.start, positions.stop - 1)}
            for sequence in sorted(edges):
                start, stop = max(positions.start, cu_seqlens[sequence]), min(positions.stop, cu_seqlens[sequence + 1])
                pieces.append(_SequencePart(sequence, start, stop - start, at + start - positions.start))
        at += len(positions)
    return pieces


def _blocks(queries: Sequence[_SequencePart], keys: Sequence[_SequencePart], window: int | None) -> list[AttentionBlock]:
    """List what the queries' holder computes on the keys' holder's keys, in the order of the positions."""
    of_sequence: dict[int, list[_SequencePart]] = {}
    for key in keys:
        of_sequence.setdefault(key.sequence, []).append(key)
    blocks: list[AttentionBlock] = []
    for query in queries:
        seen = [key for key in of_sequence.get(query.sequence, []) if key.start < query.start]
        if not seen:
            continue
        if window is not None:
            blocks += filter(None, (_through_window(query, key, window) for key in seen))
            continue
        span = (seen[0].at, seen[-1].at + seen[-1].length)
        assert span[1] - span[0] == sum(key.length for key in seen), "the keys of a sequence lie side by side"
        if blocks and blocks[-1].keys == span and blocks[-1].queries[1] == query.at:
            blocks[-1] = AttentionBlock((blocks[-1].queries[0], query.at + query.length), span)
        else:
            assert not blocks or blocks[-1].keys[1] <= span[0], "no key is needed twice"
            blocks.append(AttentionBlock((query.at, query.at + query.length), span))
    return blocks


def _through_window(query: _SequencePart, key: _SequencePart, window: int) -> AttentionBlock | None:
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
