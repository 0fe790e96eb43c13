"""Cut shared documents out of rectangles of ranks × time, so that all ranks that share one come to it at the same time.

A document takes the beginning of some ranks of a free rectangle. That leaves two: the time of those ranks after it, and the
other ranks. The dearest document comes first, and takes the smallest rectangle that holds it, on as few ranks as that allows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from .assignment import Shared, part_tokens


@dataclass(frozen=True)
class Free:
    """A free rectangle: `ranks` ranks from `first` on have this time left, and room for so many tokens of a document.

    wave  of what is cut out next
    """

    first: int
    ranks: int
    time: float
    tokens: int
    wave: int = 0

    def ranks_for(self, length: int, cost: float) -> int:
        """Return the fewest ranks on which a document keeps to the time and the room; more than there are if it can't."""
        if self.time <= 0 or self.tokens <= 0:
            return self.ranks + 1
        return max(part_tokens(length, self.tokens), int(-(-cost // self.time)))


class Rectangles:
    """The free rectangles of a step, and what was cut out of them.

    most     part of a rectangle's ranks above which a document takes all of them: few would be left beside it
    stacked  whether a document is a row of its own, after those before it on its ranks; or else joins their row
    """

    def __init__(
        self, free: Iterable[Free], lengths: Sequence[int], cost: Sequence[float], *, most: float, stacked: bool
    ) -> None:
        self.free = list(free)
        self.placed: list[Shared] = []
        self._lengths, self._cost, self._most, self._stacked = lengths, cost, most, stacked

    def place(self, document: int) -> bool:
        """Cut a document out of the smallest rectangle that holds it. Returns False if none does."""
        length, cost = self._lengths[document], self._cost[document]
        fits = [(each.ranks * each.time, at) for at, each in enumerate(self.free) if each.ranks_for(length, cost) <= each.ranks]
        if not fits:
            return False
        here = self.free[min(fits)[1]]
        width = here.ranks_for(length, cost)
        self.cut(document, here, here.ranks if width > self._most * here.ranks else width)
        return True

    def place_late(self, document: int) -> bool:
        """Cut a document out where it ends least late, on all ranks there. Returns False if no rectangle has the room."""
        length, cost = self._lengths[document], self._cost[document]
        wide = [each for each in self.free if each.tokens * each.ranks >= length]
        if wide:
            here = max(wide, key=lambda each: each.time - cost / each.ranks)
            self.cut(document, here, here.ranks)
        return bool(wide)

    def cut(self, document: int, here: Free, width: int) -> None:
        """Cut a document out of the first ranks of a rectangle."""
        self.placed.append(Shared(document, here.first, width, here.wave))
        self.free.remove(here)
        time = here.time - self._cost[document] / width
        if self._stacked:
            self.free.append(Free(here.first, width, time, here.tokens, here.wave + 1))
        else:
            room = here.tokens - part_tokens(self._lengths[document], width)
            self.free.append(Free(here.first, width, time, room, here.wave))
        if width < here.ranks:
            self.free.append(replace(here, first=here.first + width, ranks=here.ranks - width))
