"""A ReLU router (BlockFFN, arXiv 2507.08771): a token activates every expert whose logit is positive.

Shape legend: T tokens, D model width, E experts, K most experts that a token activates.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ..init import Filled
from ..part import WeightRule, reads_stream
from .charges import Charges, Tally
from .config import MixtureConfig
from .router import Carried, Routed, Router, charged
from .routing import choose_active
from .sparsity import charge_chunks, charge_locality, chunk_sum, locality_sum

SMALL = 1e-5
"""Added to the sum of a token's activations, and to their mean square."""


class ReluRouter(Router):
    """Gates are the RMSNorm of positive logits over the experts, times a gain of each. Of more than `top_k` the largest act.

    Probabilities, for charges, are the positive logits over their sum.
    """

    def __init__(self, config: MixtureConfig) -> None:
        super().__init__(config)
        self.weight = nn.Parameter(torch.empty(config.keys.count, config.dim))
        self.gain = nn.Parameter(torch.empty(config.keys.count))
        self.weight_rules = {"weight": reads_stream(config.scales), "gain": WeightRule(Filled(1.0), decays=False)}

    def forward(self, x_TD: torch.Tensor, charges: Charges | None, carried: Carried | None = None) -> Routed:
        """See `Router`. Computes in fp32, in fp64 where the model does."""
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        logits_TE = F.linear(x_TD.to(wide), self.weight.to(wide))
        if charges is not None and charges.rates.locality:
            rate = charges.rates.locality * charges.unit
            logits_TE = charge_locality(logits_TE, rate, charges.counted_BS, charges.rates.steepness)
        active_TE = logits_TE.relu()
        choice_TK, taken_TK = choose_active(active_TE.detach(), self.keys.top_k)
        tally = None
        if charges is not None:
            sum_T1 = active_TE.sum(-1, keepdim=True) + SMALL
            p_TE, tally = charged(active_TE / sum_T1, logits_TE.detach(), choice_TK, charges, taken_TK)
            if charges.chunk_rate is not None:
                p_TE = charge_chunks(p_TE, charges.chunk_rate * charges.unit, charges.counted_BS, charges.rates.chunk_length)
            _tally_sparsity(tally, p_TE.detach(), logits_TE.detach(), charges)
            active_TE = p_TE * sum_T1
        normed_TE = active_TE * torch.rsqrt(active_TE.square().mean(-1, keepdim=True) + SMALL)
        gates_TE = normed_TE * self.gain.to(wide)
        return Routed(choice_TK, gates_TE.gather(1, choice_TK), tally, taken_TK)


def _tally_sparsity(tally: Tally, p_TE: torch.Tensor, logits_TE: torch.Tensor, charges: Charges) -> None:
    """Write the sums of locality and chunks, and of the experts that chunks activate, into a new tally."""
    counted_BS, rates = charges.counted_BS, charges.rates
    if rates.locality:
        tally.others_O[5] = locality_sum(logits_TE, counted_BS, rates.steepness)
    tally.others_O[6] = chunk_sum(p_TE, counted_BS, rates.chunk_length)
    tally.others_O[7] = chunk_sum((p_TE > 0).to(p_TE.dtype), counted_BS, rates.chunk_length)
