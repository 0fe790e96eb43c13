"""Plan of whole matrices: which ranks hold their parts, who owns each, and what every rank sends and receives for it.

Each rank derives the plan from all ranks' boxes. Arrays, not objects, describe the parts: of thousands of ranks there are
millions. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from math import prod

import numpy as np
from numpy.typing import NDArray

from .routes import Hop, Numbers, hops, place

MatrixSpan = tuple[int, int, int, int]
"""The place of a matrix: the number of its parameter, its first row there, rows and columns."""


@dataclass(frozen=True)
class Parts:
    """The parts that matrices are cut into; copies are one part. They are numbered by matrix, then by their first element.

    matrix  of each part
    boxes   (parts, 4) first row and column within the parameter, rows, columns
    held    a part's number for each rank that holds it, ascending
    ranks   that rank
    """

    matrix: Numbers
    boxes: Numbers
    held: Numbers
    ranks: Numbers

    @classmethod
    def find(cls, spans: Sequence[MatrixSpan], boxes: Numbers) -> Parts:
        """Find the parts. boxes: (ranks, parameters, 4), of one parameter either the same or disjoint"""
        found: list[tuple[Numbers, Numbers, Numbers, Numbers]] = []
        count = 0
        for parameter, run in groupby(enumerate(spans), lambda each: each[1][0]):
            numbers, first, last, columns = np.array([(at, row, row + rows, width) for at, (_, row, rows, width) in run]).T
            assert (np.diff(first) > 0).all(), "matrices of a parameter are listed by their rows"
            begin, end = boxes[:, parameter, :2], boxes[:, parameter, :2] + boxes[:, parameter, 2:]
            # A rank has rows of neighbouring matrices: an entry for each of them.
            low = np.searchsorted(last, begin[:, 0], "right")
            many = np.maximum(np.searchsorted(first, end[:, 0]) - low, 0)
            ranks = np.repeat(np.arange(len(boxes)), many)
            at = np.arange(len(ranks)) - np.repeat(np.cumsum(many) - many - low, many)
            begin = np.maximum(begin[ranks], np.stack([first[at], np.zeros_like(at)], 1))
            end = np.minimum(end[ranks], np.stack([last[at], columns[at]], 1))
            there = (end > begin).all(1)
            at, ranks, cut = at[there], ranks[there], np.concatenate([begin, end - begin], 1)[there]
            _, one, part = np.unique(cut[:, 0] * columns[at] + cut[:, 1], return_index=True, return_inverse=True)
            assert (cut == cut[one][part]).all(), "parts overlap"
            order = np.argsort(part, kind="stable")
            found.append((numbers[at[one]], cut[one], count + part[order], ranks[order]))
            count += len(one)
        if not found:
            return cls(*(np.zeros(shape, dtype=np.int64) for shape in (0, (0, 4), 0, 0)))
        return cls(*(np.concatenate(each) for each in zip(*found, strict=True)))

    @property
    def sizes(self) -> Numbers:
        """Elements of each part."""
        return self.boxes[:, 2] * self.boxes[:, 3]

    @cached_property
    def first(self) -> Numbers:
        """Indices at which the holders of each part begin in `held`."""
        return np.searchsorted(self.held, np.arange(len(self.matrix)))

    def holders(self, count: int) -> list[Numbers]:
        """List the ranks that hold a part of each of so many matrices, ascending."""
        ends = np.searchsorted(self.matrix[self.held], np.arange(1, count))
        return [np.unique(ranks) for ranks in np.split(self.ranks, ends)]

    def sources(self, owners: Numbers, levels: Sequence[int]) -> Numbers:
        """Return the rank that sends each part: of its holders one that is nearest to the owner, matrix by matrix another.

        owners: of each part's matrix
        """
        away = np.zeros(len(self.held), dtype=np.int64)
        for level in range(len(levels)):
            block = prod(levels[:level])
            away += self.ranks // block != owners[self.held] // block
        near = away == np.minimum.reduceat(away, self.first)[self.held] if len(away) else np.zeros(0, dtype=bool)
        held, ranks = self.held[near], self.ranks[near]
        first = np.searchsorted(held, np.arange(len(self.matrix)))
        many = np.diff(np.append(first, len(held)))
        return ranks[first + self.matrix % np.maximum(many, 1)]


def choose_owners(
    costs: Sequence[float], candidates: Sequence[Sequence[int] | Numbers], levels: Sequence[int] | None = None
) -> list[int]:
    """Choose an owner for each matrix: the heaviest first, each to the least loaded of its candidates.

    Of these the first is taken, in levels the first by its place in the innermost: owners then lie on as many hosts as can be.
    """
    ranks = 1 + max((int(max(each)) for each in candidates), default=0)
    levels, everyone = levels or (ranks,), np.arange(ranks)
    turn = sum(place(everyone, levels, level) * prod(levels[level + 1 :]) for level in range(len(levels)))
    loads: NDArray[np.float64] = np.zeros(ranks)
    owners = [0] * len(costs)
    for number in sorted(range(len(costs)), key=lambda each: (-costs[each], each)):
        able = np.asarray(candidates[number])
        least = able[loads[able] == loads[able].min()]
        owners[number] = int(least[np.argmin(np.asarray(turn)[least])])
        loads[owners[number]] += costs[number]
    return owners


@dataclass(frozen=True)
class Wave:
    """The work of a rank for some matrices. owned: those that it computes; gather, scatter: the ways there and back"""

    owned: Sequence[int]
    gather: Sequence[Hop]
    scatter: Sequence[Hop]


@dataclass(frozen=True)
class MatrixPlan:
    """The plan of a rank.

    Parts reach their owner by the outermost level first: they then enter its host over all of the host's ranks. Results leave
    by the innermost level first, for the same reason. Where ranks of one host hold copies of most, results go there the
    outermost level first, and cross the network once for all of them, though by the owner's own network card.

    owners  of each matrix
    """

    parts: Parts
    owners: Sequence[int]
    levels: Sequence[int]

    @classmethod
    def of(
        cls, spans: Sequence[MatrixSpan], boxes: Numbers, cost: Callable[[int, int], float], levels: Sequence[int]
    ) -> MatrixPlan:
        """Plan for all ranks. boxes: see `Parts.find`; cost: of a matrix of so many rows and columns"""
        parts = Parts.find(spans, boxes)
        costs = [cost(rows, columns) for *_, rows, columns in spans]
        return cls(parts, choose_owners(costs, parts.holders(len(spans)), levels) if spans else (), levels)

    def waves(self, rank: int, numbers: Sequence[int]) -> Iterator[Wave]:
        """Yield what a rank does in each wave. numbers: the wave of each matrix"""
        parts, inward = self.parts, range(len(self.levels))[::-1]
        owners = np.asarray(self.owners, dtype=np.int64)[parts.matrix]
        sources, wave_of = parts.sources(owners, self.levels), np.asarray(numbers, dtype=np.int64)[parts.matrix]
        outward = inward if self._copies_on_hosts() else inward[::-1]
        for number in range(max(numbers, default=-1) + 1):
            there = np.flatnonzero(wave_of == number)
            back = np.flatnonzero(wave_of[parts.held] == number)
            held, ranks = parts.held[back], parts.ranks[back]
            yield Wave(
                [matrix for matrix, owner in enumerate(self.owners) if owner == rank and numbers[matrix] == number],
                list(hops(rank, self.levels, inward, there, sources[there], owners[there])),
                list(hops(rank, self.levels, outward, held, owners[held], ranks)),
            )

    def _copies_on_hosts(self) -> bool:
        """Return whether a third of what innermost blocks hold is copies. A router that all ranks have is not worth a turn."""
        parts, blocks = self.parts, self.parts.ranks // self.levels[0]
        count = int(blocks.max(initial=0)) + 1
        once = np.unique(parts.held * count + blocks) // count
        return bool(3 * parts.sizes[once].sum() <= 2 * parts.sizes[parts.held].sum() > 0)
