"""Deal the documents of a global batch to ranks: `static`, as a mesh of data × context ranks does, or `greedy`, by cost.

Both are pure functions of the documents' lengths, so that every rank finds the same assignment without a message.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from heapq import heapify, heapreplace
from itertools import pairwise

from ...config.lazy import numpy as np
from ...data.packing import best_fit
from .cost import CostModel

BRICKS = 8  # documents of less than an eighth of a row are laid end to end into bricks of an eighth


@dataclass(frozen=True)
class Shared:
    """A document that `ranks` ranks from `first` on share, zig-zag: each holds that fraction of its tokens."""

    document: int
    first: int
    ranks: int


@dataclass(frozen=True)
class Row:
    """A micro-batch of one rank: its parts of shared documents (numbers in `HybridAssignment.shared`), and whole documents."""

    shared: tuple[int, ...]
    whole: tuple[int, ...]


@dataclass(frozen=True)
class HybridAssignment:
    """The rows of each rank, and the shared documents in the global order in which every rank runs its own of them."""

    rows: tuple[tuple[Row, ...], ...]
    shared: tuple[Shared, ...]

    def times(self, lengths: Sequence[int], costs: CostModel) -> list[float]:
        """Return each rank's time; no messages are charged."""
        parts = [costs.document(lengths[each.document]) / each.ranks for each in self.shared]
        return [
            sum(
                costs.row + sum(parts[number] for number in row.shared) + sum(costs.document(lengths[n]) for n in row.whole)
                for row in rows
            )
            for rows in self.rows
        ]


def assign(lengths: Sequence[int], ranks: int, capacity: int, costs: CostModel, method: str = "greedy") -> HybridAssignment:
    """Deal documents of these lengths to `ranks` ranks, in rows of at most `capacity` tokens, by one of `METHODS`.

    Raises ValueError for a document that is longer than the rows of all ranks together.
    """
    if lengths and max(lengths) > ranks * capacity:
        raise ValueError(f"a document of {max(lengths)} tokens is longer than {ranks} rows of {capacity}, one on each rank")
    return METHODS[method](lengths, ranks, capacity, costs)


def static(lengths: Sequence[int], ranks: int, capacity: int, costs: CostModel) -> HybridAssignment:
    """Pack rows for as many ranks as the longest document needs, a divisor of all, and deal them in turn to such groups."""
    needed = -(-max(lengths, default=1) // capacity)
    group = next(n for n in range(needed, ranks + 1) if ranks % n == 0)
    shared: list[Shared] = []
    rows: list[list[Row]] = [[] for _ in range(ranks)]
    for number, documents in enumerate(_pack(range(len(lengths)), lengths, group * capacity)):
        first = number % (ranks // group) * group
        if group == 1:
            rows[first].append(Row((), tuple(documents)))
            continue
        numbers = tuple(range(len(shared), len(shared) + len(documents)))
        shared += [Shared(document, first, group) for document in documents]
        for rank in range(first, first + group):
            rows[rank].append(Row(numbers, ()))
    return HybridAssignment(tuple(map(tuple, rows)), tuple(shared))


def greedy(lengths: Sequence[int], ranks: int, capacity: int, costs: CostModel) -> HybridAssignment:
    """Spread each document that is too long or too dear for one rank over a run of ranks, and level out with the rest.

    A document gets as many ranks as hold it, and as keep its cost on each within the mean of all. The widest come first,
    each on the run whose slowest rank is fastest. Then come whole documents, the dearest first, to the fastest rank.
    """
    cost = [costs.document(length) for length in lengths]
    mean = sum(cost) / ranks
    is_long = [length > capacity or own > mean for length, own in zip(lengths, cost, strict=True)]
    widths = {
        document: min(ranks, max(-(-lengths[document] // capacity), int(cost[document] / mean) + 1))
        for document, long in enumerate(is_long)
        if long
    }
    rest = sum(own for own, long in zip(cost, is_long, strict=True) if not long)
    rounded = {document: -(-ranks // (ranks // width)) for document, width in widths.items()}
    shared, times = min(
        (_place_shared(choice, cost, ranks) for choice in (widths, rounded)),
        key=lambda placed: max(*placed[1], (sum(placed[1]) + rest) / ranks),
    )
    whole = _place_whole([document for document, long in enumerate(is_long) if not long], lengths, cost, times, capacity)
    rows = [_rows_of(rank, shared, whole[rank], lengths, capacity) for rank in range(ranks)]
    return HybridAssignment(tuple(rows), tuple(shared))


METHODS: dict[str, Callable[[Sequence[int], int, int, CostModel], HybridAssignment]] = {"static": static, "greedy": greedy}


def _place_shared(widths: dict[int, int], cost: Sequence[float], ranks: int) -> tuple[list[Shared], list[float]]:
    """Place each document on the run of ranks whose slowest is fastest; return also the ranks' times."""
    times = [0.0] * ranks
    shared: list[Shared] = []
    for document in sorted(widths, key=lambda each: (-widths[each], -cost[each], each)):
        width = widths[document]
        first = _fastest_run(times, width)
        shared.append(Shared(document, first, width))
        for rank in range(first, first + width):
            times[rank] += cost[document] / width
    return shared, times


def _fastest_run(times: Sequence[float], width: int) -> int:
    """Find the first run of `width` ranks whose slowest is fastest: a maximum over a sliding window."""
    falling: deque[int] = deque()
    best, slowest = 0, float("inf")
    for rank, time in enumerate(times):
        while falling and times[falling[-1]] <= time:
            falling.pop()
        falling.append(rank)
        if falling[0] <= rank - width:
            falling.popleft()
        if rank >= width - 1 and times[falling[0]] < slowest:
            best, slowest = rank - width + 1, times[falling[0]]
    return best


def _place_whole(
    documents: Sequence[int], lengths: Sequence[int], cost: Sequence[float], times: Sequence[float], capacity: int
) -> list[list[int]]:
    """Give documents, short ones in bricks, to the fastest rank, the dearest first; return each rank's."""
    found: list[list[int]] = [[] for _ in times]
    heap = [(time, rank) for rank, time in enumerate(times)]
    heapify(heap)
    bricks = _bricks(documents, lengths, capacity // BRICKS)
    for own, brick in sorted(((sum(cost[each] for each in brick), brick) for brick in bricks), reverse=True):
        time, rank = heap[0]
        found[rank] += brick
        heapreplace(heap, (time + own, rank))
    return found


def _bricks(documents: Sequence[int], lengths: Sequence[int], size: int) -> list[list[int]]:
    """Lay documents shorter than `size` end to end into bricks of about so many tokens; longer ones are a brick each."""
    bricks = [[document] for document in documents if lengths[document] >= size]
    brick: list[int] = []
    room = size
    for document in documents:
        if lengths[document] < size:
            if lengths[document] > room:
                bricks.append(brick)
                brick, room = [], size
            brick.append(document)
            room -= lengths[document]
    return bricks + [brick] * bool(brick)


def _rows_of(
    rank: int, shared: Sequence[Shared], whole: Sequence[int], lengths: Sequence[int], capacity: int
) -> tuple[Row, ...]:
    """Make a rank's rows: shared documents in their order, the room beside them filled, then the other documents packed."""
    rows: list[tuple[list[int], list[int]]] = []
    rooms: list[int] = []
    for number, each in enumerate(shared):
        if each.first <= rank < each.first + each.ranks:
            part = -(-lengths[each.document] // each.ranks)
            if not rooms or part > rooms[-1]:
                rows.append(([], []))
                rooms.append(capacity)
            rows[-1][0].append(number)
            rooms[-1] -= part
    left: list[int] = []
    for document in sorted(whole, key=lambda each: (-lengths[each], each)):
        fits = [(room, row) for row, room in enumerate(rooms) if room >= lengths[document]]
        if fits:
            _, row = min(fits)
            rows[row][1].append(document)
            rooms[row] -= lengths[document]
        else:
            left.append(document)
    made = [Row(tuple(numbers), tuple(documents)) for numbers, documents in rows]
    return (*made, *(Row((), tuple(documents)) for documents in _pack(left, lengths, capacity)))


def _pack(documents: Iterable[int], lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Pack documents into rows by best fit."""
    numbers = np.fromiter(documents, np.int64)
    if not len(numbers):
        return []
    order, bins = best_fit(np.array([lengths[number] for number in numbers.tolist()], np.int64), capacity)
    bounds = bins.tolist()
    return [numbers[order[start:stop]].tolist() for start, stop in pairwise(bounds)]
