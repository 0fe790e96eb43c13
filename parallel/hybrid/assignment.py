"""A plan of hybrid data parallelism: which rank holds which documents, or parts of them, in which row.

A *row* is what a rank passes through the model at once. A document that several ranks share is a part of a row on each of them,
and they must run those rows at the same time. So every shared document has a *wave*: a rank holds all that it shares in a wave
in one row, and runs such rows in the order of their waves. No rank then waits for one that waits for it: whoever is in the
earliest wave waits for no other wave. Rows without shared documents may stand anywhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .cost import CostModel


@dataclass(frozen=True)
class Shared:
    """A document that `ranks` ranks from `first` on share, zig-zag; behind the last rank comes the first.

    wave  ranks run rows with shared documents in the order of the waves
    """

    document: int
    first: int
    ranks: int
    wave: int = 0

    def members(self, of: int) -> list[int]:
        """List the ranks that share it, of so many in all."""
        return [(self.first + at) % of for at in range(self.ranks)]


@dataclass(frozen=True)
class Row:
    """A micro-batch of one rank: its parts of shared documents (numbers in `HybridAssignment.shared`), and whole documents."""

    shared: tuple[int, ...] = ()
    whole: tuple[int, ...] = ()


BLANK = Row()


@dataclass(frozen=True)
class RowTime:
    """Times of a rank in a row: it arrives, starts when all that share documents with it have arrived, works, and waits.

    arrives, starts, worked, ends  seconds, or the unit of the costs, from the beginning of the step
    """

    row: Row
    arrives: float
    starts: float
    worked: float
    ends: float

    @property
    def waits(self) -> float:
        """Time in which the rank does not work."""
        return self.starts - self.arrives + self.ends - self.worked


@dataclass(frozen=True)
class HybridAssignment:
    """The rows of each rank, and the shared documents in the global order in which every rank runs its own of them.

    lockstep  every rank has as many rows, those of a number run at the same time, and a wave is the number of a row
    stages    of a pipeline for each of the ranks, through which it passes its rows. Ranks then have as many rows, too, and a
              wave is the number of a row, but only ranks that share a document meet before the end of the step
    """

    rows: tuple[tuple[Row, ...], ...]
    shared: tuple[Shared, ...]
    lockstep: bool = False
    stages: int = 1

    @property
    def passes(self) -> int:
        """The largest number of rows that any rank runs."""
        return max(map(len, self.rows))

    def wave(self, row: Row) -> int | None:
        """Return the wave of a row; None for one that no other rank waits for."""
        return self.shared[row.shared[0]].wave if row.shared else None

    def rings(self, row: Row, lengths: Sequence[int], padding: Sequence[int]) -> list[int]:
        """Describe a row's documents, and those of padding behind them, as `context.ring_plan.plan_rings` reads them."""
        shared = [self.shared[number] for number in row.shared]
        rings = [number for each in shared for number in (lengths[each.document], each.first, each.ranks)]
        return [len(self.rows), len(shared), *rings, *(lengths[document] for document in row.whole), *padding]

    def row_cost(self, row: Row, cost: Sequence[float], costs: CostModel) -> float:
        """Return the time of a row by itself. cost: of each document, on one rank."""
        parts = sum(cost[self.shared[number].document] / self.shared[number].ranks for number in row.shared)
        return costs.row + parts + sum(cost[document] for document in row.whole)

    def times(self, lengths: Sequence[int], costs: CostModel) -> list[float]:
        """Return each rank's time at work; no messages are charged, and no waiting."""
        cost = costs.documents(lengths)
        return [sum(self.row_cost(row, cost, costs) for row in rows) for rows in self.rows]

    def step_time(self, lengths: Sequence[int], costs: CostModel) -> float:
        """Return the time of the step, waiting included: when the last rank has run its last row.

        A pipeline takes the time of its rows, and that of its slowest for each stage but one, over the number of stages.
        """
        if self.lockstep and self.stages == 1:  # as the timeline has it, sooner: planners ask for the time of many plans
            cost = costs.documents(lengths)
            together = zip(*self.rows, strict=True)
            return sum(max(self.row_cost(row, cost, costs) for row in rows) for rows in together)
        timeline = self.timeline(lengths, costs)
        if self.stages == 1:
            return max(spans[-1].ends for spans in timeline)
        rows = [[span.ends - span.starts for span in spans] for spans in timeline]
        return max(sum(times) + (self.stages - 1) * max(times) for times in rows) / self.stages

    def waiting(self, lengths: Sequence[int], costs: CostModel) -> float:
        """Return the part of all ranks' time in which they wait for others, in [0, 1)."""
        ranks_time = self.step_time(lengths, costs) * self.stages * len(self.rows)
        return 1 - sum(self.times(lengths, costs)) / ranks_time

    def timeline(self, lengths: Sequence[int], costs: CostModel) -> list[list[RowTime]]:
        """Simulate the step. Returns for each rank when it runs its rows.

        Ranks whose documents hang together in a wave run their rows layer by layer at the pace of the slowest.
        """
        cost = costs.documents(lengths)
        found: list[list[RowTime]] = [[] for _ in self.rows]
        waiting = [iter(rows) for rows in self.rows]

        def clock(rank: int) -> float:
            return found[rank][-1].ends if found[rank] else 0.0

        def run_together(members: Sequence[tuple[int, Row]]) -> None:
            begin = max(clock(rank) for rank, _ in members)
            each = [self.row_cost(row, cost, costs) for _, row in members]
            for (rank, row), own in zip(members, each, strict=True):
                found[rank].append(RowTime(row, clock(rank), begin, begin + own, begin + max(each)))

        if self.lockstep:
            for rows in zip(*self.rows, strict=True):
                run_together(list(enumerate(rows)))
            return found
        for wave in sorted({each.wave for each in self.shared}):
            at: dict[int, Row] = {}
            for rank in self._ranks_of(wave):
                for row in waiting[rank]:
                    if row.shared:
                        at[rank] = row
                        break
                    run_together([(rank, row)])
            for component in self.components(wave):
                run_together([(rank, at[rank]) for rank in component])
        for rank, rows in enumerate(waiting):
            for row in rows:
                run_together([(rank, row)])
        return found

    def _ranks_of(self, wave: int) -> Iterator[int]:
        return iter(sorted(rank for component in self.components(wave) for rank in component))

    def components(self, wave: int) -> list[list[int]]:
        """List the sets of ranks that hang together in a wave, by the documents that they share."""
        return components([each for each in self.shared if each.wave == wave], len(self.rows))


def in_lockstep(plan: HybridAssignment) -> HybridAssignment:
    """Fill a plan whose waves are numbers of rows up with blank rows, so that all ranks run as many, each at the same time."""
    rows = tuple((*each, *[BLANK] * (plan.passes - len(each))) for each in plan.rows)
    return HybridAssignment(rows, plan.shared, lockstep=True)


def components(shared: Sequence[Shared], ranks: int) -> list[list[int]]:
    """List the sets of ranks that hang together by these documents."""
    linked = [False] * ranks  # whether a rank is in one set with the rank before it
    held = [False] * ranks
    for each in shared:
        for at, rank in enumerate(each.members(ranks)):
            held[rank] = True
            linked[rank] |= at > 0
    begin = next((rank for rank in range(ranks) if not linked[rank]), 0)
    found: list[list[int]] = []
    for rank in (*range(begin, ranks), *range(begin)):
        if held[rank] and linked[rank] and found:
            found[-1].append(rank)
        elif held[rank]:
            found.append([rank])
    return found


def part_tokens(length: int, ranks: int) -> int:
    """Return the positions of a shared document that a rank holds at most."""
    return -(-length // ranks)
