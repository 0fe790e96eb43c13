"""The plan of a ring: what a member computes by itself, and its part of each exchange with others. No ranks here.

`blocks.py` says what is computed between two members; `steps.py` and `hand_on.py` which messages bring it about.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from .blocks import AttentionBlock, PlacedPiece, Positions, RingExchange, blocks_between, place_cut_documents
from .hand_on import handed_steps
from .steps import Receive, Return, Send, Step, direct_steps
from .zigzag import Piece, cut_document, deal_pieces

DIRECT = 8
"""Members of a ring in which each sends its keys directly to the others, unless told otherwise: the GPUs of one host."""


@dataclass(frozen=True)
class RingPlan:
    """A member's part in one attention: its own sequences in order (their lengths on this member), then N − 1 steps.

    own_blocks  rectangles between its own pieces of a document, which a window takes apart
    """

    own: tuple[int, ...]
    steps: tuple[Step, ...]
    own_blocks: tuple[AttentionBlock, ...] = ()

    @property
    def receives(self) -> bool:
        """True if this member computes on what others send."""
        return any(step.receives for step in self.steps)

    @property
    def returns(self) -> bool:
        """True if others' results are added to those of this member."""
        return any(each.spans for step in self.steps for each in step.returns)


@lru_cache(maxsize=256)
def plan_whole(
    length: int, size: int, index: int, window: int | None = None, direct: int = DIRECT, ring_exchange: RingExchange = "keys"
) -> RingPlan:
    """Plan for rows that are one document each; spans hold for every row of a batch alike."""
    return plan_exchange(deal_pieces((0, length), length, size), index, window, direct, ring_exchange)


@lru_cache(maxsize=64)
def plan_documents(
    cu_seqlens: tuple[int, ...],
    length: int,
    size: int,
    index: int,
    window: int | None = None,
    direct: int = DIRECT,
    ring_exchange: RingExchange = "keys",
) -> RingPlan:
    """Plan for packed rows, and remember the plan: every layer asks for that of the same micro-batch."""
    return plan_exchange(deal_pieces(cu_seqlens, length, size), index, window, direct, ring_exchange)


def plan_exchange(
    pieces: Sequence[Sequence[Piece]],
    index: int,
    window: int | None = None,
    direct: int = DIRECT,
    ring_exchange: RingExchange = "keys",
) -> RingPlan:
    """Plan the part of member `index` in an attention whose members hold these pieces, each in its order.

    Pieces of one document lie side by side on a member, ascending.
    window: positions that a query sees, its own included; None: all before it
    direct: the most members of a document that send its keys directly; more than that hand them on, if they are most of the
    ring: keys that are handed on pass all of it. Through a window all send directly
    ring_exchange: what members send; queries all send directly
    """
    placed = place_cut_documents(pieces)
    members = Counter(document for own in placed for document in {piece.document for piece in own})
    most = max(direct, len(pieces) // 2)
    wide = {document for document, count in members.items() if count > most}
    if window is not None or ring_exchange == "queries":
        wide = set[int]()
    steps = direct_steps(_only(placed, wide, inside=False), index, window, ring_exchange)
    if wide:  # first in each exchange: what is handed on names messages by their numbers
        handed = handed_steps(_only(placed, wide, inside=True), index)
        steps = [one.followed_by(other) for one, other in zip(handed, steps, strict=True)]
    own_blocks = () if window is None else tuple(blocks_between(placed[index], placed[index], window))
    return RingPlan(_own_lengths(pieces[index], apart=window is not None), tuple(steps), own_blocks)


def _only(placed: Sequence[Sequence[PlacedPiece]], documents: set[int], *, inside: bool) -> list[list[PlacedPiece]]:
    """Keep the pieces of these documents, or of all others."""
    return [[piece for piece in own if (piece.document in documents) is inside] for own in placed]


@lru_cache(maxsize=64)
def plan_rings(
    rings: tuple[int, ...], index: int, window: int | None = None, direct: int = DIRECT, ring_exchange: RingExchange = "keys"
) -> RingPlan:
    """Plan a row whose first documents are shared, each with a run of members of its own, and whose others are whole.

    rings: the number of all members, that of shared documents, (length, first member, number of members) of each, then the
    lengths of whole ones. Behind the last member comes the first. index: of this member among all. Members that share a
    document must hold it in rows that they run at the same time. direct, ring_exchange: as of `plan_exchange`, of each ring.
    In each exchange all messages are in the order of the documents, on both sides.
    """
    members, count = rings[:2]
    shared = [rings[at : at + 3] for at in range(2, 2 + 3 * count, 3)]
    own: list[int] = []
    own_blocks: list[AttentionBlock] = []
    steps: list[Step] = []
    at = 0
    for length, first, size in shared:
        plan = _plan_document(length, size, (index - first) % members, window, direct, ring_exchange)
        own += plan.own
        own_blocks += (_shifted(block, at, at) for block in plan.own_blocks)
        steps += [Step()] * (len(plan.steps) - len(steps))
        earlier = [0, *(len(step.receives) for step in steps), 0]
        for number, step in enumerate(plan.steps):
            place = _Place(at, first, members, ring_exchange, before=earlier[number], after=earlier[number + 2])
            steps[number] = place.join(steps[number], step)
        at += sum(plan.own)
    return RingPlan((*own, *rings[2 + 3 * count :]), tuple(steps), tuple(own_blocks))


@lru_cache(maxsize=256)
def _plan_document(
    length: int, size: int, index: int, window: int | None, direct: int, ring_exchange: RingExchange
) -> RingPlan:
    return plan_exchange(cut_document(length, size), index, window, direct, ring_exchange)


@dataclass(frozen=True)
class _Place:
    """The place of a step of one document's ring in the steps of all rings of a row.

    at              where the document begins on this member
    first, members  the first member of its ring, and the number of all
    ring_exchange   what members send
    before, after   messages of other rings that come first among those received in the step before, and in that after
    """

    at: int
    first: int
    members: int
    ring_exchange: RingExchange
    before: int
    after: int

    def join(self, all_rings: Step, own: Step) -> Step:
        """Add the ring's own messages."""
        receives = map(self._receive, own.receives)
        sends = map(self._send, own.sends)
        returns = map(self._return, own.returns)
        return all_rings.followed_by(Step(tuple(receives), tuple(sends), tuple(returns)))

    def _receive(self, each: Receive) -> Receive:
        queries, keys = (self.at, 0) if self.ring_exchange == "keys" else (0, self.at)
        blocks = tuple(_shifted(block, queries, keys) for block in each.blocks)
        gradient = None if each.gradient is None else replace(each.gradient, to=self._member(each.gradient.to))
        return replace(each, member=self._member(each.member), blocks=blocks, gradient=gradient)

    def _send(self, each: Send) -> Send:
        if each.received is not None:
            return replace(each, member=self._member(each.member), received=self.before + each.received)
        return replace(each, member=self._member(each.member), spans=self._own_spans(each.spans))

    def _return(self, each: Return) -> Return:
        onto = None if each.onto is None else self.after + each.onto
        return replace(each, member=self._member(each.member), spans=self._own_spans(each.spans), onto=onto)

    def _member(self, number: int) -> int:
        return (self.first + number) % self.members

    def _own_spans(self, spans: Sequence[Positions]) -> tuple[Positions, ...]:
        return tuple((self.at + start, self.at + stop) for start, stop in spans)


def _shifted(block: AttentionBlock, queries: int, keys: int) -> AttentionBlock:
    """Move a block along the member's positions."""
    shifted = (queries + block.queries[0], queries + block.queries[1]), (keys + block.keys[0], keys + block.keys[1])
    return replace(block, queries=shifted[0], keys=shifted[1])


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
