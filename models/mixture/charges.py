"""Charges: prices on router probabilities, which act in the backward pass only, and the tally of what a layer routed.

The gradient of a load-balancing loss E · Σ_i f_i · P_i by a token's probability p_i is a price, E · f_i / T. So no loss is
computed: an operator adds the price to the gradient of every token that counts. Prices arrive divided by the tokens of the
global batch, once, as the loss is (rule R2). No other factor depends on how the batch is cut.

Shape legend: T tokens of a micro-batch on this rank, in B rows (sequences or their slices), E experts, K chosen ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from .dispatch import count_sorted, narrow


@torch.library.custom_op("meshloom::charge", mutates_args=())
def charge(p_TE: torch.Tensor, price_BE: torch.Tensor, counted_T: torch.Tensor) -> torch.Tensor:
    """Return `p_TE` unchanged. The backward pass adds to the gradient of each token that counts the price of its row.

    price_BE: (B, E), B divides T; the first T / B tokens are the first row's.
    """
    return p_TE.clone()


@charge.register_fake
def _(p_TE: torch.Tensor, price_BE: torch.Tensor, counted_T: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(p_TE)


def _save_price(ctx: Any, inputs: Any, output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _charge_backward(ctx: Any, grad_TE: torch.Tensor) -> Any:
    price_BE, counted_T = ctx.saved_tensors
    counted_BS1 = counted_T.view(len(price_BE), -1, 1)
    return grad_TE + (price_BE[:, None] * counted_BS1).view_as(grad_TE).to(grad_TE.dtype), None, None


charge.register_autograd(_charge_backward, setup_context=_save_price)


@torch.library.custom_op("meshloom::charge_z", mutates_args=())
def charge_z(logits_TE: torch.Tensor, rate: torch.Tensor, counted_T: torch.Tensor) -> torch.Tensor:
    """Return the logits unchanged. The backward pass adds the gradient of `rate` · logsumexp² for each token that counts."""
    return logits_TE.clone()


@charge_z.register_fake
def _(logits_TE: torch.Tensor, rate: torch.Tensor, counted_T: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(logits_TE)


def _save_logits(ctx: Any, inputs: Any, output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _charge_z_backward(ctx: Any, grad_TE: torch.Tensor) -> Any:
    logits_TE, rate, counted_T = ctx.saved_tensors
    slope_T1 = (2 * rate * logits_TE.logsumexp(-1) * counted_T)[:, None]
    return grad_TE + (slope_T1 * logits_TE.softmax(-1)).to(grad_TE.dtype), None, None


charge_z.register_autograd(_charge_z_backward, setup_context=_save_logits)


class CountSums(Protocol):
    """Sums of counts over the ranks that hold other tokens. Where there are none, each returns what it is given."""

    def of_rows(self, counts_BE: torch.Tensor, rows_cut: bool) -> torch.Tensor:
        """Sum over the ranks that hold other slices of the same rows. rows_cut: the stream is cut along the sequence, too."""
        ...

    def of_micro_batch(self, counts_E: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks that hold other slices of the same micro-batch."""
        ...

    def of_pass(self, counts_E: torch.Tensor) -> torch.Tensor:
        """Sum over all ranks that run a micro-batch at the same time."""
        ...


class NoSums:
    """One rank. Implements `CountSums`."""

    def of_rows(self, counts_BE: torch.Tensor, rows_cut: bool) -> torch.Tensor:
        """Return them."""
        return counts_BE

    def of_micro_batch(self, counts_E: torch.Tensor) -> torch.Tensor:
        """Return them."""
        return counts_E

    def of_pass(self, counts_E: torch.Tensor) -> torch.Tensor:
        """Return them."""
        return counts_E


@dataclass(frozen=True)
class Rates:
    """Coefficients of the losses whose shares are counted while the micro-batch is routed, of the z-loss and of locality.

    steepness     of locality's sigmoids
    chunk_length  tokens of a chunk, for chunk sparsity
    """

    prefix: float = 0.0
    micro_batch: float = 0.0
    sequence: float = 0.0
    z_loss: float = 0.0
    locality: float = 0.0
    steepness: float = 100.0
    chunk_length: int = 8


@dataclass(frozen=True)
class Charges:
    """The charges of one layer for one micro-batch, and which tokens count.

    counted_BS  tokens with a target, as the layer sees the stream
    chunk_rate  coefficient of chunk sparsity, a scalar; None: there is none
    rows_cut    whether its rows are slices because the stream is cut along the sequence
    unit        1 / the tokens of the global batch, a scalar
    price_E     coefficient times shares known before the micro-batch; None: there are none
    before_E    this rank's counts of the step's micro-batches before this one, for rates.prefix; None: it is 0
    """

    counted_BS: torch.Tensor
    unit: torch.Tensor
    rates: Rates
    price_E: torch.Tensor | None = None
    before_E: torch.Tensor | None = None
    chunk_rate: torch.Tensor | None = None
    sums: CountSums = NoSums()
    rows_cut: bool = False


OTHERS = ("z", "entropy", "dropped", "micro_batch", "sequence", "locality", "chunk", "chunk_active")
"""Names of a tally's other sums."""


class Tally(NamedTuple):
    """Sums of one layer's routing of a micro-batch on this rank, over the tokens that count: detached, fp64.

    counts_E  assignments of each expert
    mass_E    sums of probabilities
    others_O  other sums, named in `OTHERS`: logsumexp², entropy, dropped assignments, the losses of micro-batch and sequence,
              each E · Σ f · p, and of ReLU routers locality, chunk sparsity, and the experts that chunks activate
    """

    counts_E: torch.Tensor
    mass_E: torch.Tensor
    others_O: torch.Tensor

    @property
    def row(self) -> torch.Tensor:
        """All of it in one vector: (2 E + O,)."""
        return torch.cat(self)


def share_of(counts: torch.Tensor) -> torch.Tensor:
    """Return counts (…, E) as shares, E · counts / their sum: 1 for an even load, 0 where nothing is counted."""
    return counts * counts.shape[-1] / counts.sum(-1, keepdim=True).clamp(min=1)


def prices(charges: Charges, counts_BE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (1 or B, E) prices of one token, and the shares in the micro-batch (1, E) and in each row (B, E)."""
    rates, counts_1E = charges.rates, counts_BE.sum(0, keepdim=True)
    micro_1E = share_of(charges.sums.of_micro_batch(counts_1E)) if rates.micro_batch else torch.zeros_like(counts_1E)
    rows_BE = share_of(charges.sums.of_rows(counts_BE, charges.rows_cut)) if rates.sequence else torch.zeros_like(counts_BE)
    price_BE = rates.micro_batch * micro_1E
    if charges.price_E is not None:
        price_BE = price_BE + charges.price_E
    if charges.before_E is not None:
        price_BE = price_BE + rates.prefix * share_of(charges.sums.of_pass(charges.before_E + counts_1E))
    if rates.sequence:
        price_BE = price_BE + rates.sequence * rows_BE
    return price_BE * charges.unit, micro_1E, rows_BE


def count_assignments(
    choice_TK: torch.Tensor, counted_BS: torch.Tensor, experts: int, taken_TK: torch.Tensor | None = None
) -> torch.Tensor:
    """Count each row's assignments of tokens that count, by expert: (B, E) fp64. No (T, K, E) array is made.

    taken_TK: which of the choices are assignments; None: all are
    """
    rows, length = counted_BS.shape
    row_T = torch.arange(rows, device=choice_TK.device).repeat_interleave(length)
    keys_TK = row_T[:, None] * experts + choice_TK
    counted_TK = counted_BS.flatten()[:, None] if taken_TK is None else counted_BS.flatten()[:, None] & taken_TK
    keys_TK = keys_TK.masked_fill(~counted_TK, rows * experts)
    return count_sorted(narrow(keys_TK.flatten(), rows * experts).sort().values, rows * experts).double().view(rows, experts)
