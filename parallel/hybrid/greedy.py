"""Deal the documents of a global batch to ranks by cost, for ranks that meet only at the end of a step (ZeRO-0 and 1).

1. A document that is longer than a row, or dearer than a rank's share of the step, is shared by as many ranks as that takes.
2. Shared documents, the dearest first, are cut out of the rectangle of all ranks × that share (`rectangles.py`).
3. Whole documents go to the fastest rank, the dearest first; short ones in bricks.
4. A rank's whole documents fill its rows: first where it would wait for others, then rows of their own. The last row of a rank
   is never shared: a rank that completes its gradients must not be waited for.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from heapq import heapify, heapreplace
from itertools import pairwise

from ...config.lazy import numpy as np
from ...data.samples.packing import best_fit
from .assignment import BLANK, HybridAssignment, Row, Shared, components, part_tokens
from .cost import CostModel
from .rectangles import Free, Rectangles

MOST = (1.0, 0.8, 0.65, 0.5, 0.4, 0.3, 0.2, 0.1)
SLACK = 1.003  # a rank may take so much more than its share
BRICKS = 32  # documents of less than this part of a row are laid end to end into bricks of such a part


def greedy(lengths: Sequence[int], ranks: int, capacity: int, costs: CostModel) -> HybridAssignment:
    """Deal documents to `ranks` ranks in rows of at most `capacity` tokens; see the module."""
    cost = effective_costs(lengths, capacity, costs)
    share = sum(cost) / ranks
    long = [number for number, length in enumerate(lengths) if length > capacity or cost[number] > share]
    placed, load = _first_within((_place_shared(long, lengths, cost, ranks, capacity, share, most) for most in MOST), share)
    shared = _merged(placed, lengths, capacity)
    taken = set(long)
    pools = deal_whole([number for number in range(len(lengths)) if number not in taken], lengths, cost, load, capacity)
    return _arrange(shared, pools, lengths, cost, ranks, capacity)


def effective_costs(lengths: Sequence[int], capacity: int, costs: CostModel) -> list[float]:
    """Return the cost of each document on one rank, with its part of the cost of a full row."""
    return replace(costs, linear=costs.linear + costs.row / capacity).documents(lengths)


def _first_within(choices: Iterable[tuple[list[Shared], list[float]]], share: float) -> tuple[list[Shared], list[float]]:
    """Return the first choice whose slowest rank keeps to its share of the step, or else the fastest."""
    best: tuple[list[Shared], list[float]] | None = None
    for choice in choices:
        if best is None or max(choice[1]) < max(best[1]):
            best = choice
        if max(best[1]) <= SLACK * share:
            break
    assert best is not None
    return best


def _place_shared(
    documents: Iterable[int],
    lengths: Sequence[int],
    cost: Sequence[float],
    ranks: int,
    capacity: int,
    share: float,
    most: float,
) -> tuple[list[Shared], list[float]]:
    """Cut documents out of the rectangle of ranks × a rank's share of the step. Returns also the time that each rank needs."""
    step = Rectangles([Free(0, ranks, share, capacity)], lengths, cost, most=most, stacked=True)
    for document in sorted(documents, key=lambda each: (-cost[each], each)):
        if not step.place(document):
            step.place_late(document)
    load = [0.0] * ranks
    for each in step.free:
        load[each.first : each.first + each.ranks] = [share - each.time] * each.ranks
    return step.placed, load


def deal_whole(
    documents: Sequence[int], lengths: Sequence[int], cost: Sequence[float], load: Sequence[float], capacity: int
) -> list[list[int]]:
    """Deal whole documents to the fastest rank, the dearest first, short ones in bricks. Returns each rank's."""
    heap = [(own, rank) for rank, own in enumerate(load)]
    found: list[list[int]] = [[] for _ in heap]
    heapify(heap)
    bricks = _bricks(documents, lengths, max(1, capacity // BRICKS))
    for own, brick in sorted(((sum(cost[each] for each in brick), brick) for brick in bricks), reverse=True):
        least, rank = heap[0]
        found[rank] += brick
        heapreplace(heap, (least + own, rank))
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


def _merged(placed: Sequence[Shared], lengths: Sequence[int], capacity: int) -> tuple[Shared, ...]:
    """Put documents of the same ranks that follow one another into one wave, as far as a row holds them."""
    found: dict[tuple[int, int, int], list[Shared]] = {}  # by run of ranks and wave
    for each in sorted(placed, key=lambda each: each.wave):
        found.setdefault((each.first, each.ranks, each.wave), []).append(each)
    for key in sorted(found, key=lambda key: key[2]):
        first, ranks, wave = key
        before = (first, ranks, wave - 1)
        if key in found and before in found:
            tokens = sum(part_tokens(lengths[each.document], ranks) for each in (*found[before], *found[key]))
            if tokens <= capacity:
                found[key] = found.pop(before) + found[key]
    merged = [replace(each, wave=wave) for (_, _, wave), group in found.items() for each in group]
    return tuple(sorted(merged, key=lambda each: (each.wave, each.first, each.document)))


class _Pool:
    """A rank's whole documents that are in no row yet, the dearest first."""

    def __init__(self, documents: Iterable[int], lengths: Sequence[int], cost: Sequence[float]) -> None:
        self._lengths, self._cost = lengths, cost
        self.left = sorted(documents, key=lambda each: (-cost[each], each))

    def take(self, time: float, room: int) -> tuple[list[int], float]:
        """Take documents that together need no more than this time and room; returns also the time that they need."""
        taken: list[int] = []
        left: list[int] = []
        used = 0.0
        for document in self.left:
            if self._lengths[document] <= room and used + self._cost[document] <= time:
                taken.append(document)
                room -= self._lengths[document]
                used += self._cost[document]
            else:
                left.append(document)
        self.left = left
        return taken, used


def _arrange(
    shared: Sequence[Shared],
    whole: Sequence[Sequence[int]],
    lengths: Sequence[int],
    cost: Sequence[float],
    ranks: int,
    capacity: int,
) -> HybridAssignment:
    """Make the rows of all ranks, whole documents filling the time in which a rank would wait."""
    pools = [_Pool(documents, lengths, cost) for documents in whole]
    rows: list[list[Row]] = [[] for _ in range(ranks)]
    clock = [0.0] * ranks
    for wave in sorted({each.wave for each in shared}):
        held: dict[int, list[int]] = {}
        for number, each in enumerate(shared):
            if each.wave == wave:
                for rank in each.members(ranks):
                    held.setdefault(rank, []).append(number)
        for members in components([each for each in shared if each.wave == wave], ranks):
            begin = max(clock[rank] for rank in members)
            parts = {rank: sum(cost[shared[n].document] / shared[n].ranks for n in held[rank]) for rank in members}
            slowest = max(parts.values())
            for rank in members:
                while clock[rank] < begin:
                    taken, used = pools[rank].take(begin - clock[rank], capacity)
                    if not taken:
                        break
                    rows[rank].append(Row((), tuple(taken)))
                    clock[rank] += used
                room = capacity - sum(part_tokens(lengths[shared[n].document], shared[n].ranks) for n in held[rank])
                taken, _ = pools[rank].take(slowest - parts[rank], room)
                rows[rank].append(Row(tuple(held[rank]), tuple(taken)))
                clock[rank] = begin + slowest
    for rank, pool in enumerate(pools):
        rows[rank] += [Row((), tuple(documents)) for documents in pack_rows(pool.left, lengths, capacity)]
        if not rows[rank] or rows[rank][-1].shared:
            rows[rank].append(_last_row(rows[rank], lengths))
    return HybridAssignment(tuple(map(tuple, rows)), tuple(shared))


def _last_row(rows: list[Row], lengths: Sequence[int]) -> Row:
    """Take the shortest whole document out of the rows for a row of its own; a blank one if there is none."""
    found = [(lengths[document], document, number) for number, row in enumerate(rows) for document in row.whole]
    if not found:
        return BLANK
    _, document, number = min(found)
    left = tuple(each for each in rows[number].whole if each != document)
    if left or rows[number].shared:
        rows[number] = replace(rows[number], whole=left)
    else:
        del rows[number]
    return Row((), (document,))


def pack_rows(documents: Iterable[int], lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Pack whole documents into rows by best fit."""
    numbers = np.fromiter(documents, np.int64)
    if not len(numbers):
        return []
    order, bins = best_fit(np.array([lengths[number] for number in numbers.tolist()], np.int64), capacity)
    return [numbers[order[start:stop]].tolist() for start, stop in pairwise(bins.tolist())]
