"""A mixture of experts as the feed-forward of a block: router, experts, and feed-forwards that every token passes.

Shape legend: B batch, S sequence, T = B·S tokens, D model width, F an expert's width, E experts, K chosen experts of a token,
N = T·K assignments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ...kernels.experts.fused import FusedExperts
from ..feed_forward import GATES, FeedForward
from ..part import BIAS, Part, WeightRule, reads_stream, writes_stream
from ..protocol import BlockKernels, TensorRole
from .charges import Charges, Tally, charge, charge_z, count_assignments, prices
from .config import MixtureConfig
from .dispatch import Assignment, Dispatch, LocalJourney, combine, sort_by_expert
from .grouped import add_bias, grouped_product
from .routing import TINY, choose_experts, gates_of, scores_of


class Routed(NamedTuple):
    """Each token's experts (T, K), the weights of their outputs (T, K), and what the tally needs; None: nothing is tallied."""

    choice_TK: torch.Tensor
    gates_TK: torch.Tensor
    tally: Tally | None


class Router(Part):
    """Chooses each token's experts. Computes in fp32, in fp64 where the model does.

    bias  added to scores in the choice only. It is no parameter: balance moves it, and it is saved as a weight
    """

    def __init__(self, config: MixtureConfig) -> None:
        super().__init__()
        self.keys = config.keys
        self.weight = nn.Parameter(torch.empty(config.keys.count, config.dim))
        self.logit_bias = nn.Parameter(torch.empty(config.keys.count)) if config.keys.logit_bias else None
        self.weight_rules = {"weight": reads_stream(config.scales), "logit_bias": BIAS}
        # On the host: values of buffers on the meta device would be lost.
        self.bias: torch.Tensor | None
        self.register_buffer("bias", torch.zeros(config.keys.count, device="cpu") if config.keys.bias else None)

    def forward(self, x_TD: torch.Tensor, charges: Charges | None) -> Routed:
        """Route tokens, and charge for it in the backward pass. charges: None in evaluations, where nothing is counted."""
        keys = self.keys
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        logits_TE = F.linear(x_TD.to(wide), self.weight.to(wide), None if self.logit_bias is None else self.logit_bias.to(wide))
        if charges is not None and charges.rates.z_loss:
            rate = (charges.rates.z_loss * charges.unit).to(wide)
            logits_TE = charge_z(logits_TE, rate, charges.counted_BS.flatten())
        scores_TE = scores_of(logits_TE, keys.scores)
        choice_TK = choose_experts(scores_TE.detach(), self.bias, keys.top_k, keys.groups, keys.top_groups)
        tally = None
        if charges is not None:
            # Probabilities of sigmoid scores are the scores over their sum (DeepSeek-V3).
            sum_T1 = 1.0 if keys.scores == "softmax" else scores_TE.sum(-1, keepdim=True) + TINY
            p_TE, tally = _charged(scores_TE / sum_T1, logits_TE.detach(), choice_TK, charges)
            scores_TE = p_TE * sum_T1
        gates_TK = gates_of(scores_TE, choice_TK, renormalise=keys.renormalise, scale=keys.scale)
        return Routed(choice_TK, gates_TK, tally)


def _charged(
    p_TE: torch.Tensor, logits_TE: torch.Tensor, choice_TK: torch.Tensor, charges: Charges
) -> tuple[torch.Tensor, Tally]:
    """Charge the prices of this micro-batch, and tally it."""
    counts_BE = count_assignments(choice_TK, charges.counted_BS, p_TE.shape[1])
    price_BE, micro_1E, rows_BE = prices(charges, counts_BE)
    counted_T1, seen_TE = charges.counted_BS.flatten()[:, None], p_TE.detach()
    mass_BE = (seen_TE * counted_T1).view(*charges.counted_BS.shape, -1).sum(1, dtype=torch.float64)
    z_T1 = logits_TE.logsumexp(-1, keepdim=True).square()
    entropy_T1 = torch.special.entr(seen_TE).sum(-1, keepdim=True)
    sums_2 = (torch.cat([z_T1, entropy_T1], dim=1) * counted_T1).sum(0, dtype=torch.float64)
    none = sums_2.new_zeros(1)
    others_5 = torch.cat([sums_2, none, (micro_1E * mass_BE).sum()[None], (rows_BE * mass_BE).sum()[None]])
    tally = Tally(counts_BE.sum(0), mass_BE.sum(0), others_5)
    return charge(p_TE, price_BE.to(p_TE.dtype), charges.counted_BS.flatten()), tally


class Experts(Part):
    """The routed experts: gated feed-forwards whose matrices are stacked along their rows.

    count   of the experts here: all of them, but for `keep`
    w1, w3  gate and up of all experts: (E·F, D)
    w2      down: (E·D, F)
    b1, b3, b2  their biases, (E·F,) and (E·D,); None without
    """

    def __init__(self, config: MixtureConfig) -> None:
        super().__init__()
        count, dim, width = config.keys.count, config.dim, config.expert.ffn_dim
        self.count = count
        self.w1 = nn.Parameter(torch.empty(count * width, dim))
        self.w2 = nn.Parameter(torch.empty(count * dim, width))
        self.w3 = nn.Parameter(torch.empty(count * width, dim))
        biases = {"b1": width, "b2": dim, "b3": width} if config.expert.bias else {}
        for name in ("b1", "b2", "b3"):
            size = biases.get(name)
            self.register_parameter(name, None if size is None else nn.Parameter(torch.empty(count * size)))
        self.weight_rules: Mapping[str, WeightRule] = {
            **dict.fromkeys(biases, BIAS),
            **dict.fromkeys(("w1", "w3"), replace(reads_stream(config.scales), stacked=count)),
            "w2": replace(writes_stream(config.scales), stacked=count),
        }
        self._gate = GATES[config.expert.activation]
        self.b1: nn.Parameter | None
        self.b2: nn.Parameter | None
        self.b3: nn.Parameter | None

    def keep(self, experts: range) -> None:
        """Keep only the weights of these experts, which then are all that it computes. Rules and names stay."""
        for name, weight in list(self.named_parameters()):
            rows = len(weight) // self.count
            kept = weight.detach()[experts.start * rows : experts.stop * rows].clone()
            self.register_parameter(name, nn.Parameter(kept))
        self.count = len(experts)

    def forward(self, rows_ND: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
        """Compute each row's expert. Rows are sorted by expert; those behind the last expert's may come out as anything."""
        gate_NF = self._projected(rows_ND, self.w1, self.b1, counts_E)
        up_NF = self._projected(rows_ND, self.w3, self.b3, counts_E)
        return self._projected(self._gate(gate_NF, up_NF), self.w2, self.b2, counts_E)

    def _projected(
        self, rows_NI: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, counts_E: torch.Tensor
    ) -> torch.Tensor:
        out_NO = grouped_product(rows_NI, weight.unflatten(0, (self.count, -1)), counts_E)
        return out_NO if bias is None else add_bias(out_NO, bias.unflatten(0, (self.count, -1)), counts_E)


class SharedExperts(FeedForward):
    """The feed-forward that every token passes. It is cut with the tokens, not by features."""

    tensor_roles: ClassVar[Mapping[str, TensorRole]] = {}


class Mixture(Part):
    """Routed experts, weighted by the router, plus the shared ones.

    dispatch  brings tokens to experts and back; a run may replace it
    fused     the kernels to use where they fit; None: tokens are copied for their experts, and products are grouped
    """

    def __init__(self, config: MixtureConfig) -> None:
        super().__init__()
        self.config, self.keys = config, config.keys
        self.router = Router(config)
        self.experts = Experts(config)
        self.shared = None if config.shared is None else SharedExperts(config.shared)
        self.dispatch: Dispatch = LocalJourney
        self.fused: FusedExperts | None = None

    def use_kernels(self, kernels: BlockKernels) -> None:
        """Compute with these kernels from now on."""
        self.fused = kernels.experts if self.config.can_fuse else None
        if self.shared is not None:
            self.shared.use_kernels(kernels)

    def num_inputs(self, x_BSD: torch.Tensor) -> int:
        """Count the readers of the input: the router, the experts, and the shared experts' products."""
        return 2 if self.shared is None else 2 + self.shared.num_inputs(x_BSD)

    def forward(self, inputs: Sequence[torch.Tensor], charges: Charges | None) -> tuple[torch.Tensor, Tally | None]:
        """Compute it. inputs: the same (B, S, D), `num_inputs` times. Returns (B, S, D), and the tally under charges."""
        routed_BSD, x_BSD, *rest = inputs
        x_TD = x_BSD.flatten(0, 1)
        routed = self.router(routed_BSD.flatten(0, 1), charges)
        counted_T = None if charges is None else charges.counted_BS.flatten()
        assignment = sort_by_expert(routed.choice_TK, self.keys.count, self.keys.capacity, counted_T)
        if self._fuses(x_TD):
            y_BSD = self._fused(x_TD, routed.gates_TK, assignment).view_as(x_BSD)
            return y_BSD if self.shared is None else y_BSD + self.shared(rest), routed.tally
        journey = self.dispatch(assignment)
        shared_BSD = None if self.shared is None else self.shared(rest)  # while ranks tell each other what they will send
        rows_ND, counts_E = journey.send(x_TD)
        y_TKD = journey.back(self.experts(rows_ND, counts_E))
        y_BSD = combine(y_TKD, routed.gates_TK).view_as(x_BSD)
        if shared_BSD is not None:
            y_BSD = y_BSD + shared_BSD
        if routed.tally is None or charges is None or assignment.kept_TK is None:
            return y_BSD, routed.tally
        dropped = (~assignment.kept_TK & charges.counted_BS.flatten()[:, None]).sum()
        routed.tally.others_5[2] = dropped
        return y_BSD, routed.tally

    def _fuses(self, x_TD: torch.Tensor) -> bool:
        own = self.experts
        return self.fused is not None and self.dispatch is LocalJourney and self.fused.fits(x_TD, own.w1, own.count)

    def _fused(self, x_TD: torch.Tensor, gates_TK: torch.Tensor, assignment: Assignment) -> torch.Tensor:
        """Compute the experts, and the sum of their outputs, by the fused kernels: (T, D)."""
        own, fused = self.experts, self.fused
        assert fused is not None
        return fused(x_TD, own.w1, own.w3, own.w2, gates_TK, assignment.order_N, assignment.inverse_TK, assignment.counts_E)


def mixtures_of(module: nn.Module) -> dict[str, Mixture]:
    """Find the mixtures in a module, by name."""
    return {name: each for name, each in module.named_modules() if isinstance(each, Mixture)}


def experts_of(module: nn.Module) -> dict[str, Experts]:
    """Find the routed experts in a module, by name."""
    return {name: each for name, each in module.named_modules() if isinstance(each, Experts)}


def sends_tokens(module: nn.Module) -> bool:
    """Return whether a module's tokens travel to experts elsewhere."""
    return any(mixture.dispatch is not LocalJourney for mixture in mixtures_of(module).values())


def makes_choices(module: nn.Module) -> bool:
    """Return whether a module routes tokens: recomputation must then keep the choice."""
    return any(isinstance(each, Router) for each in module.modules())
