"""Cut shared documents out of rectangles of ranks × time, so that all ranks that share one come to it at the same time.

A document takes the beginning of some ranks of a free rectangle. That leaves two: the time of those ranks after it, and the
other ranks. The dearest document comes first, and takes the smallest rectangle that holds it, on as few ranks as that allows.
"""

from __future__ import annotations

from bisect import bisect_left, insort
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
        self.placed: list[Shared] = []
        self._lengths, self._cost, self._most, self._stacked = lengths, cost, most, stacked
        self._number = 0
        self._by_area: list[tuple[float, int, Free]] = []
        for each in free:
            self.add(each)

    @property
    def free(self) -> list[Free]:
        """List the free rectangles, the smallest first."""
        return [each for *_, each in self._by_area]

    def add(self, rectangle: Free) -> None:
        """Add a free rectangle."""
        self._number += 1
        insort(self._by_area, (rectangle.ranks * rectangle.time, self._number, rectangle))

    def place(self, document: int) -> bool:
        """Cut a document out of the smallest rectangle that holds it. Returns False if none does."""
        length, cost = self._lengths[document], self._cost[document]
        for at in range(bisect_left(self._by_area, (cost * (1 - 1e-9), 0)), len(self._by_area)):
            here = self._by_area[at][2]
            width = here.ranks_for(length, cost)
            if width <= here.ranks:
                del self._by_area[at]
                self._cut(document, here, here.ranks if width > self._most * here.ranks else width)
                return True
        return False

    def place_late(self, document: int) -> None:
        """Cut a document out where it ends least late, on all ranks there; on all ranks if no rectangle has the room."""
        length, cost = self._lengths[document], self._cost[document]
        wide = [entry for entry in self._by_area if entry[2].tokens * entry[2].ranks >= length]
        if wide:
            entry = max(wide, key=lambda each: each[2].time - cost / each[2].ranks)
            self._by_area.remove(entry)
            here = entry[2]
        else:
            every = self.free
            ranks, tokens = sum(each.ranks for each in every), max(each.tokens for each in every)
            here = Free(0, ranks, min(each.time for each in every), tokens, max(each.wave for each in every))
            self._by_area = []
        self._cut(document, here, here.ranks)

    def place_alone(self, document: int, row: Free) -> None:
        """Cut a document out of a new rectangle, on as few ranks as that allows, or else on all of them."""
        width = row.ranks_for(self._lengths[document], self._cost[document])
        self._cut(document, row, min(width, row.ranks))

    def _cut(self, document: int, here: Free, width: int) -> None:
        """Cut a document out of the first ranks of a rectangle, which is no longer among the free ones."""
        self.placed.append(Shared(document, here.first, width, here.wave))
        time = here.time - self._cost[document] / width
        if self._stacked:
            self.add(Free(here.first, width, time, here.tokens, here.wave + 1))
        else:
            self.add(Free(here.first, width, time, here.tokens - part_tokens(self._lengths[document], width), here.wave))
        if width < here.ranks:
            self.add(replace(here, first=here.first + width, ranks=here.ranks - width))
