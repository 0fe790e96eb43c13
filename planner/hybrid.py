"""The load of a step that hybrid data parallelism deals, from the lengths of its documents. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from ..models.config import DecoderConfig
from ..models.costs import ForwardPass, block_bytes
from ..parallel.context.zigzag import cut_document
from ..parallel.hybrid.assignment import HybridAssignment, Row
from ..parallel.hybrid.hidden_copies import HiddenCopies, spread_blocks
from ..parallel.hybrid.share import HybridAssigner, padding_lengths
from .cost import LayoutCost


@dataclass(frozen=True)
class DealtStep:
    """The documents of a step, as they are dealt.

    rows     of the rank that runs most
    filled   tokens of all ranks' rows, padding included, over those of `rows` full rows on each
    waiting  part of the ranks' time in which the plan has them wait for one another, in [0, 1)
    length   mean positions of the document that a token is in: attention costs as much as with documents of that length
    shared   documents that several ranks share
    on_host  blocks whose activations a full row keeps on the host, by the row that leaves most of them on the device
    host_bytes  of the row that keeps most on the host
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
        """Bytes of host memory that rows may pin: copies of two at once, in tensors rounded up to powers of two."""
        return round(4 * self.host_bytes)


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
    rows = [(each, tokens, dealer.padded(tokens, row)) for each, tokens in _row_tokens(plan, lengths)]
    taken = sum(length for _, _, length in rows)
    filled = 1.0 if plan.stages > 1 else taken / (len(plan.rows) * plan.passes * row)
    length = sum(length * length for length in lengths) / sum(lengths)
    on_host, host_bytes = 0, 0.0
    if hidden is not None:
        rings = [plan.rings(each, lengths, padding_lengths(tokens, padded)) for each, tokens, padded in rows]
        on_host, host_bytes = _on_host(rings, [padded for _, _, padded in rows], hidden, layers)
    return DealtStep(plan.passes, filled, waiting, length, len(plan.shared), on_host, host_bytes)


def with_rows_on_host(cost: LayoutCost, dealt: DealtStep, model: DecoderConfig, work: ForwardPass) -> LayoutCost:
    """Take the activations that rows keep on the host away from what ranks hold. work: of a full row."""
    chosen = spread_blocks(dealt.on_host, model.layers)
    saved = sum(block_bytes(model.block(layer), work, "none") for layer in chosen)
    return replace(cost, ranks=[replace(rank, activations=rank.activations - saved) for rank in cost.ranks])


def _on_host(rings: Sequence[Sequence[int]], positions: Sequence[int], hidden: HiddenCopies, layers: int) -> tuple[int, float]:
    """Return the blocks on the host of a full row, and the bytes there of the row that has most.

    Of a row of few documents, or short ones, little may be on the host, but little is on the device, too. A full row is taken
    to leave as large a part there, of the positions of the longest row, as the row that leaves most.
    """
    counts = [len(hidden.layers(each, layers)) for each in rings]
    left = max(length * (layers - count) for length, count in zip(positions, counts, strict=True))
    kept = max(length * count for length, count in zip(positions, counts, strict=True))
    return layers - math.ceil(left / max(positions)), kept / layers * hidden.token_bytes


def _row_tokens(plan: HybridAssignment, lengths: Sequence[int]) -> Iterator[tuple[Row, int]]:
    """Yield each row of each rank with its tokens, without padding."""
    for rank, rows in enumerate(plan.rows):
        for row in rows:
            tokens = sum(lengths[document] for document in row.whole)
            for shared in (plan.shared[number] for number in row.shared):
                pieces = cut_document(lengths[shared.document], shared.ranks)[(rank - shared.first) % len(plan.rows)]
                tokens += sum(piece.length for piece in pieces)
            yield row, tokens
