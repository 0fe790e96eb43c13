"""A data rank's share of a global batch under hybrid data parallelism: plan the step, and read this rank's rows.

The samples of the global batch are taken apart into their documents, without the padding between them. Which documents are in
the batch stays a matter of the data order (R1); only who computes them changes.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

from ...config.lazy import numpy as np
from ...data.assignment import Share, any_number
from ...data.batch import IGNORED, GlobalBatch, MicroBatch, Samples, document_lengths, sample_part
from ..config import ParallelConfig
from ..context.zigzag import cut_document
from ..layout import Layout, uses_fsdp
from ..pipeline.stages import legal_micro_batches
from .assignment import HybridAssignment, Row
from .by_worker import WorkerPlan, deal_by_worker, deal_worker, ranks_of_worker
from .cost import CostModel, costs_of
from .pipelined import filled
from .planning import assign, row_unit

CLASSES = 8
PADDING = 128  # positions of a document of padding at most: attention to a longer one would cost something

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class BatchDocuments:
    """The documents of a global batch, by number: the sample of each, where it begins there, and its length."""

    batch: GlobalBatch
    samples: NDArray[np.int64]
    starts: NDArray[np.int64]
    lengths: list[int]

    @classmethod
    def of(cls, samples: Samples, batch: GlobalBatch) -> BatchDocuments:
        """Ask the samples for their documents."""
        found = [document_lengths(samples, index) for index in batch.indices()]
        owner = np.repeat(np.arange(batch.first, batch.first + batch.count), [len(lengths) for lengths in found])
        starts = np.concatenate([np.cumsum(lengths) - lengths for lengths in found])
        return cls(batch, owner, starts, np.concatenate(found).tolist())

    def workers(self, micro: int) -> list[list[int]]:
        """List the documents of each micro-batch of `micro` samples, as `data.assignment` cuts the batch."""
        first, count = self.batch.first, self.batch.count
        starts = range(first, first + count, min(micro, count))
        bounds = [*np.searchsorted(self.samples, starts).tolist(), len(self.lengths)]
        return [list(range(begin, end)) for begin, end in pairwise(bounds)]


@dataclass(frozen=True)
class HybridAssigner:
    """The rule by which a run deals the documents of its global batches to data ranks. Implements `data.assignment.Dealer`.

    flops     of the model, by the length of a document: what costs are estimated from
    capacity  tokens of a row at most; None: those of a micro-batch of samples
    unit      a row's positions are a multiple of it, filled up with padding
    lockstep  all ranks run as many rows, each at the same time
    classes   the number of lengths that rows may have, filled up with padding: a compiler makes kernels for each. None: any
    measured  costs in seconds, by rates that were measured; None: they are estimated from FLOPs
    stages    ranks of the pipeline that runs the rows of a data rank; in one, every row has as many positions
    can_run   whether a step may have this number of rows; the schedule of a pipeline may not allow every number
    """

    data_size: int
    flops: CostModel
    capacity: int | None = None
    unit: int = 1
    lockstep: bool = False
    classes: int | None = None
    stages: int = 1
    can_run: Callable[[int], bool] = any_number
    measured: CostModel | None = None

    @classmethod
    def of(
        cls,
        parallel: ParallelConfig,
        layout: Layout,
        row: int,
        flops: CostModel,
        *,
        compiled: bool = False,
        measured: CostModel | None = None,
    ) -> HybridAssigner:
        """Make the rule that a config asks for. row: tokens of a micro-batch of samples; compiled: whether blocks are."""
        unit = row_unit(parallel.hdp_tokens or row, layout.tp)
        if layout.pp > 1:
            can_run = partial(legal_micro_batches, parallel)
            return cls(layout.data_size, flops, parallel.hdp_tokens, unit, layout.ep > 1, 1, layout.pp, can_run, measured)
        together = uses_fsdp(parallel, layout) or layout.ep > 1
        classes = CLASSES if compiled else None
        return cls(layout.data_size, flops, parallel.hdp_tokens, unit, together, classes, measured=measured)

    def row_tokens(self, seq_len: int, micro: int) -> int:
        """Return the tokens of a row at most, of micro-batches of `micro` samples of `seq_len` positions."""
        whole = (self.capacity or 0) // self.unit * self.unit  # no row grows beyond the capacity when it is filled up
        return whole if self.data_size * whole >= seq_len else self.capacity or micro * seq_len

    def row_tokens_by_worker(self, documents: BatchDocuments, seq_len: int, micro: int) -> int:
        """Return the same of a step that is dealt worker by worker.

        A pipeline fills all rows up to it, and a row has one worker alone: there it is a rank's share of one. On several ranks
        it is a sixteenth more, so that documents need not fill rows to the last token.
        """
        capacity = self.row_tokens(seq_len, micro)
        if self.stages == 1:
            return capacity
        workers = documents.workers(micro)
        most = max(sum(documents.lengths[document] for document in own) for own in workers)
        together = ranks_of_worker(most, len(workers), self.data_size, capacity)
        share = micro * seq_len if together == 1 else -(-micro * seq_len * 17 // (16 * together))
        return min(capacity, -(-share // self.unit) * self.unit)

    def padded(self, filled: int, row_tokens: int) -> int:
        """Return the positions of a row with so many tokens, where rows have at most `row_tokens`."""
        whole = -(-row_tokens // self.unit) * self.unit
        if self.classes is not None:
            filled = -(-max(1, -(-filled * self.classes // whole)) * whole // self.classes)
        return max(1, -(-filled // self.unit)) * self.unit

    def costs(self, row_tokens: int) -> CostModel:
        """Return the costs by which documents are dealt to rows of so many tokens at most."""
        costs = self.measured or costs_of(self.flops)
        return costs if self.stages == 1 else filled(costs, row_tokens)

    def plan(self, lengths: Sequence[int], seq_len: int, micro: int) -> HybridAssignment:
        """Deal documents of these lengths, from samples of `seq_len` positions."""
        capacity = self.row_tokens(seq_len, micro)
        method = "lockstep" if self.lockstep else "greedy"
        return assign(lengths, self.data_size, capacity, self.costs(capacity), method, self.stages, self.can_run)

    def plan_by_worker(self, documents: BatchDocuments, seq_len: int, micro: int) -> WorkerPlan:
        """Deal the documents of a global batch, from samples of `seq_len` positions, worker by worker."""
        capacity = self.row_tokens_by_worker(documents, seq_len, micro)
        costs = self.costs(capacity)

        def deal(lengths: Sequence[int], ranks: int) -> HybridAssignment:
            return deal_worker(lengths, ranks, capacity, costs, self.stages)

        lengths, workers = documents.lengths, documents.workers(micro)
        cost = costs.documents(lengths)
        dealt = deal_by_worker(lengths, cost, workers, self.data_size, capacity, deal, self.can_run)
        return replace(dealt, plan=replace(dealt.plan, lockstep=self.lockstep, stages=self.stages))

    def load(self, samples: Samples, batch: GlobalBatch, micro: int, data_rank: int, *, by_worker: bool = False) -> Share:
        """Plan the step of a global batch, and read the rows of one data rank."""
        documents = BatchDocuments.of(samples, batch)
        measured = self.plan_by_worker(documents, samples.seq_len, micro) if by_worker else None
        plan = self.plan(documents.lengths, samples.seq_len, micro) if measured is None else measured.plan
        tokens_of = partial(self.row_tokens_by_worker, documents) if by_worker else self.row_tokens
        row_tokens = tokens_of(samples.seq_len, micro)
        rows = _RowReader(samples, documents, plan, data_rank, partial(self.padded, row_tokens=row_tokens))
        return Share(
            [rows.read(row) for row in plan.rows[data_rank]],
            passes=plan.passes,
            workers=0 if measured is None else measured.workers,
            worker_rows=None if measured is None else measured.rows_of(data_rank),
            checksum=zlib.crc32(repr((documents.lengths, plan, measured and measured.groups)).encode()),
            numbers={
                "hybrid/planned_wait": plan.waiting(documents.lengths, self.costs(row_tokens)),
                "hybrid/shared_documents": len(plan.shared),
                "hybrid/passes": plan.passes,
            },
            flops=sum(self.flops.documents(documents.lengths)),
        )


@dataclass(frozen=True)
class _Piece:
    """Positions [start, start + length) of a document, and whether the piece before it in the row is of the same one."""

    document: int
    start: int
    length: int
    goes_on: bool = False


class _RowReader:
    """Reads the rows of one data rank."""

    def __init__(
        self,
        samples: Samples,
        documents: BatchDocuments,
        plan: HybridAssignment,
        data_rank: int,
        padded: Callable[[int], int],
    ) -> None:
        """padded: the positions of a row with so many tokens."""
        self._samples, self._documents, self._plan = samples, documents, plan
        self._rank, self._padded = data_rank, padded

    def read(self, row: Row) -> MicroBatch:
        """Read the documents of a row, shared ones first, and fill it up with short documents of padding."""
        import torch

        from ...kernels.documents import Documents

        pieces = list(self._pieces(row))
        filled = sum(piece.length for piece in pieces)
        length = self._padded(filled)
        tokens, positions, ids = (np.zeros(length, np.int64) for _ in range(3))
        targets = np.full(length, IGNORED, np.int64)
        own: list[int] = []
        at = 0
        for piece in pieces:
            here = slice(at, at + piece.length)
            start = int(self._documents.starts[piece.document]) + piece.start
            sample = int(self._documents.samples[piece.document])
            part = sample_part(self._samples, sample, start, start + piece.length)
            tokens[here], targets[here] = part.tokens, part.targets
            positions[here] = np.arange(piece.start, piece.start + piece.length)
            if piece.goes_on:
                own[-1] += piece.length
            else:
                own.append(piece.length)
            ids[here] = len(own) - 1
            at += piece.length
        for padding in padding_lengths(filled, length):
            here = slice(at, at + padding)
            positions[here], ids[here] = np.arange(padding), len(own)
            own.append(padding)
            at += padding
        bounds = torch.tensor(np.cumsum([0, *own]), dtype=torch.int32)
        rings = self._plan.rings(row, self._documents.lengths, padding_lengths(filled, length))
        documents = Documents(torch.from_numpy(ids)[None], bounds, bounds, host_rings=torch.tensor(rings))
        return MicroBatch(
            torch.from_numpy(tokens)[None], torch.from_numpy(targets)[None], documents, torch.from_numpy(positions)[None]
        )

    def _pieces(self, row: Row) -> Iterator[_Piece]:
        for number in row.shared:
            shared = self._plan.shared[number]
            index = (self._rank - shared.first) % len(self._plan.rows)
            for at, piece in enumerate(cut_document(self._documents.lengths[shared.document], shared.ranks)[index]):
                yield _Piece(shared.document, piece.start, piece.length, goes_on=at > 0)
        for document in row.whole:
            yield _Piece(document, 0, self._documents.lengths[document])


def padding_lengths(filled: int, length: int) -> list[int]:
    """List the short documents of padding that fill a row of so many tokens up to a length."""
    return [min(PADDING, length - start) for start in range(filled, length, PADDING)]
