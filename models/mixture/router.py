"""Routers: they choose each token's experts, and the weights of these experts' outputs.

Shape legend: T tokens of a micro-batch, D model width, E experts, K chosen experts of a token, P width of a recurrent state.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ...kernels.experts.fused import FusedExperts
from ..part import BIAS, Part, reads_stream
from .charges import OTHERS, Charges, Tally, charge, charge_z, count_assignments, prices
from .config import MixtureConfig
from .routing import TINY, choose_experts, gates_of, scores_of


class CellWeights(NamedTuple):
    """Weights of the cell that recurrent routers share: (3 P, P) twice, (3 P,) twice, as `torch.nn.GRUCell` has them."""

    weight_ih: torch.Tensor
    weight_hh: torch.Tensor
    bias_ih: torch.Tensor
    bias_hh: torch.Tensor


class Carried(NamedTuple):
    """The recurrent routers' way from layer to layer: each token's state, and the cell that they share."""

    state_TP: torch.Tensor
    cell: CellWeights


class Routed(NamedTuple):
    """The result of a router.

    choice_TK  each token's experts, int64
    gates_TK   weights of their outputs, in the router's precision
    tally      sums of what was routed; None: nothing is tallied
    taken_TK   which of the choices are assignments; None: all are
    state_TP   the state that goes to the next layer; None: there is none
    """

    choice_TK: torch.Tensor
    gates_TK: torch.Tensor
    tally: Tally | None
    taken_TK: torch.Tensor | None = None
    state_TP: torch.Tensor | None = None


class Router(Part):
    """Base class of routers. One of a user's own overrides `forward`, or of `TopKRouter` the logits.

    It chooses by `routing.choose_experts` or `choose_active`, whose results activation policies keep. What it chooses otherwise
    is chosen again where a block is computed again.

    bias  added to scores in the choice only. It is no parameter: balance moves it, and it is saved as a weight
    """

    bias: torch.Tensor | None

    def __init__(self, config: MixtureConfig) -> None:
        super().__init__()
        self.config, self.keys = config, config.keys
        # On the host: values of buffers on the meta device would be lost.
        self.register_buffer("bias", torch.zeros(config.keys.count, device="cpu") if config.keys.bias else None)

    def use_kernels(self, experts: FusedExperts | None) -> None:
        """Compute with these kernels from now on, if it can."""

    def forward(self, x_TD: torch.Tensor, charges: Charges | None, carried: Carried | None = None) -> Routed:
        """Route tokens, and charge for it in the backward pass.

        charges: None where nothing is charged or counted. carried: from the last layer with a recurrent router.
        """
        raise NotImplementedError


class TopKRouter(Router):
    """Chooses each token's `top_k` best experts. Computes in fp32, in fp64 where the model does.

    fused  the kernels that compute logits; None: PyTorch's product, of tokens that are copied in fp32
    """

    def __init__(self, config: MixtureConfig) -> None:
        super().__init__(config)
        self.weight = nn.Parameter(torch.empty(config.keys.count, config.dim))
        self.logit_bias = nn.Parameter(torch.empty(config.keys.count)) if config.keys.logit_bias else None
        self.weight_rules = {"weight": reads_stream(config.scales), "logit_bias": BIAS}
        self.fused: FusedExperts | None = None

    def use_kernels(self, experts: FusedExperts | None) -> None:
        """See `Router`. A class of a user's own may have other logits."""
        self.fused = experts if type(self).logits is TopKRouter.logits else None

    def logits(self, x_TD: torch.Tensor) -> torch.Tensor:
        """Compute the logits (T, E) of tokens that are in the router's precision."""
        return self.linear(x_TD)

    def linear(self, x_TI: torch.Tensor) -> torch.Tensor:
        """Multiply with `weight`, and add the trained bias, if there is one."""
        bias = None if self.logit_bias is None else self.logit_bias.to(x_TI.dtype)
        return F.linear(x_TI, self.weight.to(x_TI.dtype), bias)

    def forward(self, x_TD: torch.Tensor, charges: Charges | None, carried: Carried | None = None) -> Routed:
        """See `Router`."""
        if self.fused is not None:
            logits_TE = self.fused.logits(x_TD, self.weight)
            return self.route(logits_TE if self.logit_bias is None else logits_TE + self.logit_bias, charges)
        return self.route(self.logits(x_TD.to(torch.promote_types(x_TD.dtype, torch.float32))), charges)

    def route(self, logits_TE: torch.Tensor, charges: Charges | None) -> Routed:
        """Choose experts by their logits."""
        keys = self.keys
        if charges is not None and charges.rates.z_loss:
            rate = (charges.rates.z_loss * charges.unit).to(logits_TE.dtype)
            logits_TE = charge_z(logits_TE, rate, charges.counted_BS.flatten())
        scores_TE = scores_of(logits_TE, keys.scores)
        choice_TK = choose_experts(scores_TE.detach(), self.bias, keys.top_k, keys.groups, keys.top_groups)
        tally = None
        if charges is not None:
            # Probabilities of sigmoid scores are the scores over their sum (DeepSeek-V3).
            sum_T1 = 1.0 if keys.scores == "softmax" else scores_TE.sum(-1, keepdim=True) + TINY
            p_TE, tally = charged(scores_TE / sum_T1, logits_TE.detach(), choice_TK, charges)
            scores_TE = p_TE * sum_T1
        gates_TK = gates_of(scores_TE, choice_TK, renormalise=keys.renormalise, scale=keys.scale)
        return Routed(choice_TK, gates_TK, tally)


def charged(
    p_TE: torch.Tensor,
    logits_TE: torch.Tensor,
    choice_TK: torch.Tensor,
    charges: Charges,
    taken_TK: torch.Tensor | None = None,
) -> tuple[torch.Tensor, Tally]:
    """Charge the prices of this micro-batch on probabilities, and tally it. logits_TE: detached; taken_TK: see `Routed`.

    Returns the probabilities, which must be used in the place of those that were given, and the tally.
    """
    counts_BE = count_assignments(choice_TK, charges.counted_BS, p_TE.shape[1], taken_TK)
    price_BE, micro_1E, rows_BE = prices(charges, counts_BE)
    counted_T1, seen_TE = charges.counted_BS.flatten()[:, None], p_TE.detach()
    mass_BE = (seen_TE * counted_T1).view(*charges.counted_BS.shape, -1).sum(1, dtype=torch.float64)
    z_T1 = logits_TE.logsumexp(-1, keepdim=True).square()
    entropy_T1 = torch.special.entr(seen_TE).sum(-1, keepdim=True)
    sums_2 = (torch.cat([z_T1, entropy_T1], dim=1) * counted_T1).sum(0, dtype=torch.float64)
    losses_2 = torch.stack([(micro_1E * mass_BE).sum(), (rows_BE * mass_BE).sum()])
    others_O = torch.cat([sums_2, sums_2.new_zeros(1), losses_2, sums_2.new_zeros(len(OTHERS) - 5)])
    tally = Tally(counts_BE.sum(0), mass_BE.sum(0), others_O)
    return charge(p_TE, price_BE.to(p_TE.dtype), charges.counted_BS.flatten()), tally
