"""The exchanges of a wide ring, in which neighbours hand keys on: a member has messages with two others, however wide it is.

In each step a member sends to the one before it what it received in the step before, at first its own keys. The keys of
member j pass j − 1, …, 0 and then N − 1, …, j + 1. Those first see both of its zig-zag pieces, and these the early one: so a
span is left out as soon as nobody further on sees it, and keys of a document that all hold take no more bytes than if they were
sent directly (the other way around every message would be whole). Where few hold one, they pass many who don't see them:
`ring_plan.py` leaves such documents out. The gradient of keys travels with them, a step behind, and comes home after N steps.
It is the sum of all members so far, whole and in the wider dtype of sums, which is more bytes than direct gradients.

There are no windows here. Through one a member's keys are seen by few others, which may be the last that they pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .blocks import PlacedPiece, Positions, blocks_between, from_message_start
from .steps import Receive, Return, Send, Step, TravellingGradient, length_of

Limits = dict[int, int]
"""Document → where the latest queries begin that some members have of it: they see the pieces that begin before."""


def handed_steps(placed: Sequence[Sequence[PlacedPiece]], index: int) -> list[Step]:
    """Plan the N − 1 exchanges of member `index`. placed: the pieces of each member of documents that are cut."""
    size = len(placed)
    before, after = (index - 1) % size, (index + 1) % size
    latest = [_latest(pieces) for pieces in placed]
    seen_anywhere = [_spans_before(pieces, limits) for pieces, limits in zip(placed, _of_others(latest), strict=True)]
    # What a message still has to reach are the members from its receiver on downwards, fewer with each step.
    from_here, from_before = _downwards(latest, index), _downwards(latest, before)
    latest_message: tuple[Positions, ...] = ()
    steps: list[Step] = []
    for step in range(1, size):
        source, sent_of, coming = ((index + step + more) % size for more in (0, -1, 1))
        left = size - step  # members that the keys have yet to reach, the receiver included
        message = _spans_before(placed[source], from_here[left - 1])
        sent = _spans_before(placed[sent_of], from_before[left - 1])
        blocks = from_message_start(blocks_between(placed[index], placed[source], None), message)
        receives, sends, returns = (), (), ()
        if seen_anywhere[source]:
            whole = seen_anywhere[source]
            gradient = TravellingGradient(before, length_of(whole), _within(message, whole))
            receives = (Receive(after, length_of(message), blocks, gradient),)
        if sent:
            sends = (Send(before, sent, None) if step == 1 else Send(before, _within(sent, latest_message), 0),)
        if returned := seen_anywhere[coming]:
            home = step == size - 1
            returns = (Return(after, length_of(returned), returned if home else (), onto=None if home else 0, travels=True),)
        steps.append(Step(receives, sends, returns))
        latest_message = message
    return steps


def _latest(pieces: Sequence[PlacedPiece]) -> Limits:
    """Return where a member's latest piece of each document begins."""
    return {piece.document: piece.start for piece in pieces}  # pieces of a document ascend: the last one stays


def _later(one: Mapping[int, int], other: Mapping[int, int]) -> Limits:
    """Return the limits of two sets of members together."""
    return {document: max(one.get(document, -1), other.get(document, -1)) for document in {**one, **other}}


def _downwards(latest: Sequence[Limits], first: int) -> list[Limits]:
    """Return the limits of the first 1, 2, … N − 1 members downwards from one, behind 0 the last."""
    found: list[Limits] = [latest[first]]
    for distance in range(1, len(latest) - 1):
        found.append(_later(found[-1], latest[(first - distance) % len(latest)]))
    return found


def _of_others(latest: Sequence[Limits]) -> list[Limits]:
    """Return for each member the limits of all others together."""
    ahead: list[Limits] = [{}]
    behind: list[Limits] = [{}]
    for one, other in zip(latest[:-1], latest[:0:-1], strict=True):
        ahead.append(_later(ahead[-1], one))
        behind.append(_later(behind[-1], other))
    return [_later(one, other) for one, other in zip(ahead, reversed(behind), strict=True)]


def _spans_before(pieces: Sequence[PlacedPiece], limits: Mapping[int, int]) -> tuple[Positions, ...]:
    """Return where a member's pieces lie that begin before the limits of their documents: one span for each document."""
    spans: dict[int, Positions] = {}
    for piece in pieces:
        if piece.start < limits.get(piece.document, -1):
            start, _ = spans.get(piece.document, (piece.at, piece.at))
            spans[piece.document] = (start, piece.at + piece.length)
    return tuple(sorted(spans.values()))


def _within(spans: Sequence[Positions], message: Sequence[Positions]) -> tuple[Positions, ...]:
    """Return where spans lie in a message that holds these spans, each inside of one."""
    found: list[Positions] = []
    for start, stop in spans:
        at = 0
        for first, last in message:
            if first <= start and stop <= last:
                found.append((at + start - first, at + stop - first))
                break
            at += last - first
    assert len(found) == len(spans), "a message holds what is handed on of it"
    return tuple(found)
