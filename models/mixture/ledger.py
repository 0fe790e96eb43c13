"""Ledger: what the mixtures of a rank's layers charge in a step, and the sums of what they routed.

Shape legend: L layers with a mixture, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from .charges import OTHERS, Charges, CountSums, NoSums, Rates, Tally


class Ledger:
    """The charges and tallies of one step. A block's tally is written once, where its output is used.

    sums_LN  sums of the step's tallies on this rank, N = 2 E + O, fp64
    """

    def __init__(
        self, layers: Sequence[int], experts: int, device: torch.device, rates: Rates, sums: CountSums | None = None
    ) -> None:
        """layers: all of the model's with a mixture, whether this rank holds them or not."""
        self._rows = {layer: row for row, layer in enumerate(layers)}
        self._experts, self._rates, self._count_sums = experts, rates, sums or NoSums()
        self.sums_LN = torch.zeros(len(layers), 2 * experts + len(OTHERS), dtype=torch.float64, device=device)
        self._price_LE: torch.Tensor | None = None
        self._chunk_rate: torch.Tensor | None = None
        self._unit = torch.zeros((), dtype=torch.float64, device=device)

    def begin(self, global_tokens: torch.Tensor, price_LE: torch.Tensor | None, chunk_rate: torch.Tensor | None = None) -> None:
        """Begin a step, or the pass of a step that only counts.

        price_LE: prices known beforehand, times the tokens; chunk_rate: coefficient of chunk sparsity
        """
        self._chunk_rate = chunk_rate
        self._unit = 1 / global_tokens.double()
        self._price_LE = price_LE
        self.sums_LN = torch.zeros_like(self.sums_LN)

    def charges(self, layer: int, counted_BS: torch.Tensor, rows_cut: bool) -> Charges | None:
        """Return what a layer charges for the next micro-batch; None for one without a mixture. See `Routing`."""
        if layer not in self._rows:
            return None
        row = self._rows[layer]
        before = self.sums_LN[row, : self._experts].clone() if self._rates.prefix else None
        price = None if self._price_LE is None else self._price_LE[row]
        return Charges(counted_BS, self._unit, self._rates, price, before, self._chunk_rate, self._count_sums, rows_cut)

    def record(self, layer: int, tally: Tally) -> None:
        """Add what a layer routed of one micro-batch."""
        self.sums_LN[self._rows[layer]] += tally.row


@dataclass(frozen=True)
class Routing:
    """One micro-batch's access to the ledger.

    counted_BS  its positions with a target, as this rank's layers see them
    rows_cut    whether rows are slices because the stream is cut along the sequence
    """

    ledger: Ledger
    counted_BS: torch.Tensor
    rows_cut: bool = False

    def charges(self, layer: int) -> Charges | None:
        """Return what a layer charges."""
        return self.ledger.charges(layer, self.counted_BS, self.rows_cut)

    def record(self, layer: int, tally: Tally) -> None:
        """Add what a layer routed."""
        self.ledger.record(layer, tally)

    def cut(self, dim: int, parts: int, index: int) -> Routing:
        """Return the access for one of equal parts of the positions."""
        return replace(self, counted_BS=self.counted_BS.chunk(parts, dim)[index], rows_cut=dim == 1)
