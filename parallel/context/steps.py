"""The exchanges of a ring in order: the messages of each, and what is computed on them. Here every member sends directly.

Either keys move to the queries that see them, or queries to the keys that they see (TokenRing, arXiv 2412.20501). In the t-th
step a member sends to the one t places after it just those of its positions that this one needs. It computes on what it
receives, and results go back to the sender: gradients of keys, or outputs and gradients of queries. Over all steps it has
messages with every other member: a wide ring keeps many connections open. `hand_on.py` has another way for keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .blocks import AttentionBlock, PlacedPiece, Positions, RingExchange, blocks_between, from_message_start, spans_of


@dataclass(frozen=True)
class TravellingGradient:
    """The gradient of keys that members hand on, which goes around with them and ends at their holder.

    to      the member that gets it after this one
    length  of the gradient: of all keys of the holder that any member sees
    keys    where the spans of the message lie in it
    """

    to: int
    length: int
    keys: tuple[Positions, ...]


@dataclass(frozen=True)
class Receive:
    """Keys or queries that a member receives: from whom, how many, and what it computes on them.

    blocks    count what has moved from the message's start, and the other side on this member
    gradient  None: that of the message goes back to whom it came from
    """

    member: int
    length: int
    blocks: tuple[AttentionBlock, ...]
    gradient: TravellingGradient | None = None


@dataclass(frozen=True)
class Send:
    """Keys or queries that a member sends: to whom, and which spans, in the order of the message.

    received  of which message of the step before the spans are; None: of its own positions
    """

    member: int
    spans: tuple[Positions, ...]
    received: int | None = None

    @property
    def length(self) -> int:
        """Length of the message."""
        return length_of(self.spans)


@dataclass(frozen=True)
class Return:
    """Results that a member receives after a step: from whom, how many, and what they are added to.

    spans    of its own positions
    onto     or the gradient that travels with this message of the next step
    travels  whether it has gone from member to member, as a sum in a wider dtype than that of keys
    """

    member: int
    length: int
    spans: tuple[Positions, ...] = ()
    onto: int | None = None
    travels: bool = False


@dataclass(frozen=True)
class Step:
    """The t-th exchange around each ring that a member belongs to, all its messages at once. All are in the rings' order."""

    receives: tuple[Receive, ...] = ()
    sends: tuple[Send, ...] = ()
    returns: tuple[Return, ...] = ()

    def followed_by(self, other: Step) -> Step:
        """Return one exchange of both, whose messages are in this order."""
        return Step((*self.receives, *other.receives), (*self.sends, *other.sends), (*self.returns, *other.returns))


def length_of(spans: Sequence[Positions]) -> int:
    """Return the number of positions in spans."""
    return sum(stop - start for start, stop in spans)


def direct_steps(
    placed: Sequence[Sequence[PlacedPiece]], index: int, window: int | None, ring_exchange: RingExchange = "keys"
) -> list[Step]:
    """Plan the N − 1 exchanges of member `index`, in which each sends to every other member itself.

    placed: the pieces of each member of documents that are cut; window: positions that a query sees; None: all before it
    """

    def computed(sender: int, receiver: int) -> list[AttentionBlock]:
        queries, keys = (receiver, sender) if ring_exchange == "keys" else (sender, receiver)
        return blocks_between(placed[queries], placed[keys], window)

    size = len(placed)
    steps: list[Step] = []
    for distance in range(1, size):
        source, target = (index - distance) % size, (index + distance) % size
        blocks = computed(source, index)
        spans = spans_of(blocks, ring_exchange)
        receive = Receive(source, length_of(spans), from_message_start(blocks, spans, ring_exchange))
        send = Send(target, spans_of(computed(index, target), ring_exchange))
        returned = Return(target, send.length, send.spans)
        steps.append(Step((receive,) * bool(receive.length), (send,) * bool(send.length), (returned,) * bool(send.length)))
    return steps
