"""The load of a step that hybrid data parallelism deals, from the lengths of its documents. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..parallel.context.zigzag import cut_document
from ..parallel.hybrid.assignment import HybridAssignment
from ..parallel.hybrid.share import HybridAssigner


@dataclass(frozen=True)
class DealtStep:
    """The documents of a step, as they are dealt.

    rows     of the rank that runs most
    filled   tokens of all ranks' rows, padding included, over those of `rows` full rows on each
    waiting  part of the ranks' time in which the plan has them wait for one another, in [0, 1)
    length   mean positions of the document that a token is in: attention costs as much as with documents of that length
    shared   documents that several ranks share
    """

    rows: int
    filled: float
    waiting: float
    length: float
    shared: int


def dealt_step(lengths: Sequence[int], dealer: HybridAssigner, seq_len: int, micro: int) -> DealtStep:
    """Plan a step of these documents as a run does, from samples of `seq_len` positions in micro-batches of `micro`.

    Raises ValueError for a document that is longer than all ranks' rows together.
    """
    plan, row = dealer.plan(lengths, seq_len, micro), dealer.row_tokens(seq_len, micro)
    costs = dealer.costs(row)
    # A pipeline's bubble is simulated by its schedule, and its rows are full.
    mean = sum(plan.times(lengths, costs)) / len(plan.rows)
    even = mean * (1 + (plan.stages - 1) / plan.passes) / plan.stages
    waiting = max(0.0, 1 - even / plan.step_time(lengths, costs))
    taken = sum(dealer.padded(tokens, row) for tokens in _row_tokens(plan, lengths))
    filled = 1.0 if plan.stages > 1 else taken / (len(plan.rows) * plan.passes * row)
    length = sum(length * length for length in lengths) / sum(lengths)
    return DealtStep(plan.passes, filled, waiting, length, len(plan.shared))


def _row_tokens(plan: HybridAssignment, lengths: Sequence[int]) -> Iterator[int]:
    """Yield the tokens of each row of each rank, without padding."""
    for rank, rows in enumerate(plan.rows):
        for row in rows:
            tokens = sum(lengths[document] for document in row.whole)
            for shared in (plan.shared[number] for number in row.shared):
                pieces = cut_document(lengths[shared.document], shared.ranks)[(rank - shared.first) % len(plan.rows)]
                tokens += sum(piece.length for piece in pieces)
            yield tokens
