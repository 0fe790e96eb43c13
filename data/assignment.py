"""Assignment: which data rank runs which part of a global batch, and in which pass.

The global batch is cut, in order, into micro-batches. The cut depends on the batch and on the size of a micro-batch alone, so
it is the same on every layout. The micro-batches are then dealt to the data ranks, pass by pass: rank r of R runs micro-batches
r, R + r, 2R + r, … Any batch can be dealt to any number of ranks, because *blanks* fill what is missing: a blank row has
ordinary tokens and every target ignored, so it adds nothing to the loss or to a gradient.

    7 samples, micro-batches of 2, 3 ranks      pass 1: (0 1) (2 3) (4 5)      pass 2: (6 –) (– –) (– –)

What the ranks of a run must agree on (how many passes a step has, for example) is a property of the assignment, which every
rank computes alike. No rank may infer it from its own micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count as naturals
from typing import Protocol

from ..config.lazy import numpy as np
from .batch import IGNORED, GlobalBatch, MicroBatch, Sample, Samples


@dataclass(frozen=True)
class BatchAssignment:
    """The micro-batches of every data rank in one step.

    ranks       by data rank, its micro-batches in order, each as the indices of its samples; an empty one is blank
    rows        rows of every micro-batch; those without a sample are blank
    first_half  passes that cover the first half of the global list of micro-batches; None: dealt regardless of halves
    """

    ranks: tuple[tuple[range, ...], ...]
    rows: int
    first_half: int | None = None

    @property
    def passes(self) -> int:
        """The largest number of micro-batches, blanks included, that any rank runs."""
        return max(map(len, self.ranks))

    @property
    def workers(self) -> int:
        """Micro-batches of the whole batch that hold samples."""
        return sum(1 for rank in self.ranks for indices in rank if indices)


@dataclass(frozen=True)
class WorkerRows:
    """Workers of one data rank, where a worker is not each micro-batch by itself.

    ranks  data ranks that share their workers, neighbours: the first is a multiple of it
    own    the numbers of these workers in the batch
    turns  by micro-batch of this rank, which of these workers it is a part of, in order; None: blank on all of the ranks
    """

    ranks: int
    own: tuple[int, ...]
    turns: tuple[int | None, ...]


@dataclass(frozen=True)
class Share:
    """One data rank's part of a global batch, loaded: what an engine accumulates.

    micro_batches  of this rank, in order, blanks included
    passes         the largest number of micro-batches that any rank runs; the same on every rank
    workers        of the gradient statistics: micro-batches of samples, of the whole batch; blanks are none. 0: not dealt for
                   them
    first_half     how many of this rank's micro-batches come from the first half of the global batch; None: not known
    worker_rows    how this rank's micro-batches make up workers; None: each of them is one
    checksum       of the plan that the share is taken from; the same on every rank, which must agree on it. None: no plan
    flops          of the model on the whole global batch, each document at its own length; None: not counted
    numbers        of the plan, by name, for the loggers
    """

    micro_batches: Sequence[MicroBatch]
    passes: int
    workers: int
    first_half: int | None = None
    worker_rows: WorkerRows | None = None
    checksum: int | None = None
    flops: float | None = None
    numbers: Mapping[str, float] = field(default_factory=dict)

    @property
    def valid_tokens(self) -> int:
        """Positions of this share that carry loss. Call it while the targets are still on the CPU."""
        return sum(batch.valid_tokens for batch in self.micro_batches)


class Dealer(Protocol):
    """A rule by which global batches are dealt to data ranks."""

    def load(self, samples: Samples, batch: GlobalBatch, micro: int, data_rank: int, *, by_worker: bool = False) -> Share:
        """Deal a global batch in micro-batches of `micro` samples, and read the share of one data rank.

        by_worker: so that the gradient of each micro-batch of samples can be told, for gradient statistics
        """
        ...


def any_number(passes: int) -> bool:
    """Allow every number of passes, as a step without a pipeline does."""
    return True


@dataclass(frozen=True)
class Assigner:
    """The rule by which a run deals whole samples to data ranks. Implements `Dealer`.

    data_size  number of data ranks, of this island
    can_run    whether a step may have this number of passes; the schedule of a pipeline may not allow every number
    halves     whether the first half of the micro-batches must be done before the second begins
    islands    parts into which a global batch is cut, as equal as can be, before one of them is dealt: under local updating
    island     the part that is dealt
    """

    data_size: int = 1
    can_run: Callable[[int], bool] = any_number
    halves: bool = False
    islands: int = 1
    island: int = 0

    def part(self, batch: GlobalBatch) -> GlobalBatch:
        """Return the island's part of a global batch. It depends on the batch and on the number of islands alone."""
        first, end = (batch.count * island // self.islands for island in (self.island, self.island + 1))
        return GlobalBatch(batch.first + first, end - first)

    def assign(self, batch: GlobalBatch, micro: int) -> BatchAssignment:
        """Deal a global batch in micro-batches of `micro` samples; of fewer, if the whole batch has fewer."""
        batch = self.part(batch)
        rows, passes, first_half = self._sizes(batch.count, micro)
        indices = batch.indices()
        parts = [indices[start : start + rows] for start in range(0, batch.count, rows)]
        middle = len(parts) // 2 if self.halves else 0
        blank = range(0)

        def dealt(rank: int) -> tuple[range, ...]:
            first = parts[:middle][rank :: self.data_size]
            first += [blank] * (first_half - len(first))
            mine = first + parts[middle:][rank :: self.data_size]
            return (*mine, *[blank] * (passes - len(mine)))

        ranks = tuple(dealt(rank) for rank in range(self.data_size))
        return BatchAssignment(ranks, rows, first_half if self.halves else None)

    def load(self, samples: Samples, batch: GlobalBatch, micro: int, data_rank: int, *, by_worker: bool = False) -> Share:
        """Deal a global batch in micro-batches of `micro` samples, and read the share of one data rank: always by worker."""
        return load_share(samples, self.assign(batch, micro), data_rank)

    def passes(self, count: int, micro: int) -> int:
        """Count the micro-batches that each rank runs for a global batch of `count` samples, at most."""
        return self._sizes(-(-count // self.islands), micro)[1]

    def blank_share(self, count: int, micro: int) -> float:
        """Return the fraction of a step's rows that is blank, in [0, 1), for a global batch of `count` samples."""
        rows, passes, _ = self._sizes(-(-count // self.islands), micro)
        return 1 - count / (rows * passes * self.data_size * self.islands)

    def sizes_without_blanks(self, count: int, micro: int) -> list[int]:
        """Find the nearest batch sizes that need no blanks, at most one on each side of `count`, ascending."""
        unit = micro * self.data_size * self.islands
        below = next((n for n in range(count // unit * unit, 0, -unit) if not self.blank_share(n, micro)), None)
        above = next(n for n in naturals(-(-count // unit) * unit, unit) if not self.blank_share(n, micro))
        return sorted({n for n in (below, above) if n is not None})

    def _sizes(self, count: int, micro: int) -> tuple[int, int, int]:
        """Return rows of a micro-batch, passes of a step, and passes before the second half (0 without halves)."""
        assert count >= 1, "a batch has a sample for each island"
        rows = min(micro, count)
        parts = -(-count // rows)
        middle = parts // 2 if self.halves else 0
        first_half = -(-middle // self.data_size)
        least = first_half + -(-(parts - middle) // self.data_size)
        return rows, next(n for n in naturals(least) if self.can_run(n)), first_half


def load_share(samples: Samples, assignment: BatchAssignment, data_rank: int) -> Share:
    """Read the samples of one data rank, and fill its micro-batches with blank rows to their usual shape."""
    batches = [_collate(samples, indices, assignment) for indices in assignment.ranks[data_rank]]
    return Share(batches, assignment.passes, assignment.workers, assignment.first_half)


def _collate(samples: Samples, indices: range, assignment: BatchAssignment) -> MicroBatch:
    rows = [samples[index] for index in indices]
    if len(rows) < assignment.rows:
        like = rows[0] if rows else samples[assignment.ranks[0][0][0]]
        blank = Sample(like.tokens, np.full_like(like.targets, IGNORED), like.documents)
        rows += [blank] * (assignment.rows - len(rows))
    return MicroBatch.collate(rows)
