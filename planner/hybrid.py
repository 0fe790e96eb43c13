"""The load of a step that hybrid data parallelism deals, from the lengths of its documents. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from ..models.config import DecoderConfig
from ..models.costs import ForwardPass, block_bytes
from ..parallel.context.zigzag import cut_document
from ..parallel.hybrid.assignment import HybridAssignment
from ..parallel.hybrid.hidden_copies import PINNED, HiddenCopies, spread_blocks
from ..parallel.hybrid.share import HybridAssigner
from .cost import LayoutCost


@dataclass(frozen=True)
class DealtStep:
    """The documents of a step, as they are dealt.

    rows     of the rank that runs most
    filled   tokens of all ranks' rows, padding included, over those of `rows` full rows on each
    waiting  part of the ranks' time in which the plan has them wait for one another, in [0, 1)
    length   mean positions of the document that a token is in: attention costs as much as with documents of that length
    shared   documents that several ranks share
    on_host  blocks whose activations every full row of any step keeps on the host, whatever its documents
    host_bytes  of a row of any step on the host at most
    """

    rows: int
    filled: float
    waiting: float
    length: float
    shared: int
    on_host: int = 0
    host_bytes: float = 0.0

    @property
    def pinned_bytes(self) -> int:
        """Bytes of host memory that rows may pin."""
        return round(PINNED * self.host_bytes)


def dealt_step(
    lengths: Sequence[int],
    dealer: HybridAssigner,
    seq_len: int,
    micro: int,
    hidden: HiddenCopies | None = None,
    layers: int = 0,
) -> DealtStep:
    """Plan a step of these documents as a run does, from samples of `seq_len` positions in micro-batches of `micro`.

    hidden: the rule of what rows keep on the host, of so many blocks, taken to be alike; None: nothing
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
    on_host, host_bytes = 0, 0.0
    if hidden is not None:
        full = dealer.padded(row, row)  # later steps may fill it with other documents
        on_host, host_bytes = len(hidden.layers_of_any_row(full, layers)), hidden.most_bytes(full, seq_len, layers)
    return DealtStep(plan.passes, filled, waiting, length, len(plan.shared), on_host, host_bytes)


def with_rows_on_host(cost: LayoutCost, dealt: DealtStep, model: DecoderConfig, work: ForwardPass) -> LayoutCost:
    """Take the activations that rows keep on the host away from what ranks hold. work: of a full row."""
    chosen = spread_blocks(dealt.on_host, model.layers)
    saved = sum(block_bytes(model.block(layer), work, "none") for layer in chosen)
    return replace(cost, ranks=[replace(rank, activations=rank.activations - saved) for rank in cost.ranks])


def _row_tokens(plan: HybridAssignment, lengths: Sequence[int]) -> Iterator[int]:
    """Yield the tokens of each row of each rank, without padding."""
    for rank, rows in enumerate(plan.rows):
        for row in rows:
            tokens = sum(lengths[document] for document in row.whole)
            for shared in (plan.shared[number] for number in row.shared):
                pieces = cut_document(lengths[shared.document], shared.ranks)[(rank - shared.first) % len(plan.rows)]
                tokens += sum(piece.length for piece in pieces)
            yield tokens
