"""The exchanges of a ring in order: the messages of each, and what is computed on them. Here each holder sends directly.

In the t-th step a member sends to the one t places after it just those of its keys that this one sees. Over all steps it has
messages with every other member: a wide ring keeps many connections open. `hand_on.py` has the other way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .blocks import AttentionBlock, PlacedPiece, Span, blocks_between, from_message_start, spans_of


@dataclass(frozen=True)
class TravellingGradient:
    """The gradient of keys that members hand on, which goes around with them and ends at their holder.

    to      the member that gets it after this one
    length  of the gradient: of all keys of the holder that any member sees
    keys    where the spans of the message lie in it
    """

    to: int
    length: int
    keys: tuple[Span, ...]


@dataclass(frozen=True)
class Receive:
    """Keys that a member receives: from whom, how many, and what it computes on them. Blocks count from the message's start.

    gradient  None: that of the message goes back to whom it came from
    """

    member: int
    length: int
    blocks: tuple[AttentionBlock, ...]
    gradient: TravellingGradient | None = None


@dataclass(frozen=True)
class Send:
    """Keys that a member sends: to whom, and which spans, in the order of the message.

    received  of which message of the step before the spans are; None: of its own keys
    """

    member: int
    keys: tuple[Span, ...]
    received: int | None = None

    @property
    def length(self) -> int:
        """Length of the message."""
        return length_of(self.keys)


@dataclass(frozen=True)
class Return:
    """Gradients of keys that a member receives after a step: from whom, how many, and what they are added to.

    keys     spans of its own keys
    onto     or the gradient that travels with this message of the next step
    travels  whether it has gone from member to member, as a sum in a wider dtype than that of keys
    """

    member: int
    length: int
    keys: tuple[Span, ...] = ()
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


def length_of(spans: Sequence[Span]) -> int:
    """Return the number of positions in spans."""
    return sum(stop - start for start, stop in spans)


def direct_steps(placed: Sequence[Sequence[PlacedPiece]], index: int, window: int | None) -> list[Step]:
    """Plan the N − 1 exchanges of member `index`, in which every holder sends its keys to each member itself.

    placed: the pieces of each member of documents that are cut; window: positions that a query sees; None: all before it
    """
    size = len(placed)
    steps: list[Step] = []
    for distance in range(1, size):
        source, target = (index - distance) % size, (index + distance) % size
        seen = blocks_between(placed[index], placed[source], window)
        spans = spans_of(seen)
        receive = Receive(source, length_of(spans), from_message_start(seen, spans))
        send = Send(target, spans_of(blocks_between(placed[target], placed[index], window)))
        returned = Return(target, send.length, keys=send.keys)
        steps.append(Step((receive,) * bool(receive.length), (send,) * bool(send.length), (returned,) * bool(send.length)))
    return steps
