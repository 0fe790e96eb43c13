"""Deal documents to ranks that run their rows together, as many each: weights are gathered, and gradients reduced, in every row
(ZeRO-2 and 3), or tokens travel to the ranks of their experts.

A step takes the sum over rows of the slowest rank's row, so that every row must be balanced by itself. Few rows are full of
tokens: next to a long document, whose tokens are dear, short ones fill a row's room and not its time. Many rows cost their
starts. So several numbers of rows are tried. For each number, a row may take the same part of all cost on every rank:

1. Documents longer than a row, or dearer than a part of that time, are cut out of the rows' rectangles of ranks × time
   (`rectangles.py`).
2. Whole documents, the dearest first, go to where most time is left, as far as there is room.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from heapq import heapify, heappop, heappush, heapreplace
from typing import TYPE_CHECKING

from ...config.lazy import numpy as np
from .assignment import HybridAssignment, Row
from .cost import CostModel, least_time
from .rectangles import Free, Rectangles

if TYPE_CHECKING:
    from numpy.typing import NDArray

SHARING = ((1.0, 1.0), (1.0, 0.5), (1.0, 0.2), (0.25, 0.0), (0.1, 0.0))
"""Ways of sharing that are tried, with the fewest messages first. A document is shared that takes more than the first part of a
row's time. If it would take more than the second part of the ranks that are free, it takes all of them."""
ENOUGH = 1.01  # times the least time that any plan takes: no further one is tried
CLEARLY = 0.99  # a plan with more messages is chosen only if its time is less than this times the best so far
CHOICES = 6  # numbers of rows that are tried


def lockstep(lengths: Sequence[int], ranks: int, capacity: int, costs: CostModel) -> HybridAssignment:
    """Deal documents to `ranks` ranks in rows of at most `capacity` tokens."""
    least, cost = fewest_rows(lengths, ranks, capacity), costs.documents(lengths)
    most = max(least, _rows_of_short(cost, ranks, costs.linear * capacity))
    numbers = sorted({round(least * (most / least) ** (at / (CHOICES - 1))) for at in range(CHOICES)})
    plans = plans_of_rows(lengths, ranks, capacity, cost, numbers, SHARING)
    return first_fast(plans, lambda plan: plan.step_time(lengths, costs), least_time(lengths, ranks, capacity, costs))


def fewest_rows(lengths: Sequence[int], ranks: int, capacity: int) -> int:
    """Return the number of rows of each rank that hold the tokens."""
    return max(1, -(-sum(lengths) // (ranks * capacity)))


def _rows_of_short(cost: Sequence[float], ranks: int, row: float) -> int:
    """Return the number of rows of each rank that take the time of rows full of short documents.

    row: time of such a row. Where it takes none, as of a model that counts attention alone, that is a row for each document.
    """
    return int(-(-sum(cost) // (ranks * row))) if row else len(cost)


def first_fast(
    plans: Iterable[HybridAssignment], time_of: Callable[[HybridAssignment], float], least: float
) -> HybridAssignment:
    """Return the first plan that is about as fast as `least`, or else the fastest; of about as fast ones the first."""
    best: tuple[float, HybridAssignment] | None = None
    for plan in plans:
        time = time_of(plan)
        if best is None or time < CLEARLY * best[0]:
            best = time, plan
        if best[0] <= ENOUGH * least:
            break
    assert best is not None
    return best[1]


def plans_of_rows(
    lengths: Sequence[int],
    ranks: int,
    capacity: int,
    cost: Sequence[float],
    numbers: Sequence[int],
    sharing: Sequence[tuple[float, float]],
) -> Iterator[HybridAssignment]:
    """Yield plans that begin with each of these numbers of rows, for each way to share (see `SHARING`)."""
    order = np.argsort(-np.array(cost, np.float64), kind="stable")  # the dearest first
    for large, part in sharing:
        for count in numbers:
            yield _Rows(lengths, cost, order, ranks, capacity, count, large, part).plan()


class _Rows:
    """Rows of all ranks being filled, each with the same time on every rank."""

    def __init__(
        self,
        lengths: Sequence[int],
        cost: Sequence[float],
        order: NDArray[np.int64],
        ranks: int,
        capacity: int,
        count: int,
        large: float,
        most: float,
    ) -> None:
        """order: of the documents, the dearest first."""
        self._lengths, self._cost, self._ranks, self._capacity = lengths, cost, ranks, capacity
        self._order = order
        self._count, self._large = count, large
        self._level = sum(cost) / (ranks * count)
        free = [Free(0, ranks, self._level, capacity, wave) for wave in range(count)]
        self._rectangles = Rectangles(free, lengths, cost, most=most, stacked=False)

    def plan(self) -> HybridAssignment:
        """Place all documents."""
        costs, lengths = np.array(self._cost, np.float64)[self._order], np.array(self._lengths, np.int64)[self._order]
        is_shared = (lengths > self._capacity) | (costs > self._large * self._level)
        whole: list[int] = self._order[~is_shared].tolist()
        for document in self._order[is_shared].tolist():
            if not self._rectangles.place(document):
                row = Free(0, self._ranks, max(self._level, self._cost[document] / self._ranks), self._capacity, self._count)
                self._count += 1
                self._rectangles.place_alone(document, row)
        dealt = self._deal(whole)
        shared = sorted(self._rectangles.placed, key=lambda each: (each.wave, each.first, each.document))
        numbers: dict[tuple[int, int], list[int]] = {}
        for number, each in enumerate(shared):
            for rank in each.members(self._ranks):
                numbers.setdefault((rank, each.wave), []).append(number)
        rows = tuple(
            tuple(Row(tuple(numbers.get((rank, wave), ())), tuple(dealt.get((rank, wave), ()))) for wave in range(self._count))
            for rank in range(self._ranks)
        )
        return HybridAssignment(rows, tuple(shared), lockstep=True)

    def _deal(self, documents: Sequence[int]) -> dict[tuple[int, int], list[int]]:
        """Put each document where most time is left. Returns the documents of each (rank, row)."""
        slots = [
            (-each.time, each.tokens, rank, each.wave)
            for each in self._rectangles.free
            for rank in range(each.first, each.first + each.ranks)
        ]
        heapify(slots)
        found: dict[tuple[int, int], list[int]] = {}
        parked: list[tuple[int, float, int, int]] = []  # too little room for documents so far, the most room first
        for document in documents:
            length = self._lengths[document]
            while parked and -parked[0][0] >= length:
                room, time, rank, row = heappop(parked)
                heappush(slots, (time, -room, rank, row))
            while slots and slots[0][1] < length:
                time, room, rank, row = heappop(slots)
                heappush(parked, (-room, time, rank, row))
            if not slots:
                slots = [(-self._level, self._capacity, rank, self._count) for rank in range(self._ranks)]
                self._count += 1
            time, room, rank, row = slots[0]
            found.setdefault((rank, row), []).append(document)
            heapreplace(slots, (time + self._cost[document], room - length, rank, row))
        return found
