"""A mixture of experts as the feed-forward of a block: router, experts, and feed-forwards that every token passes.

Shape legend: B batch, S sequence, T = B·S tokens, D model width, F an expert's width, E experts, K chosen experts of a token,
N = T·K assignments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import nn

from ...kernels.experts.fused import FusedExperts
from ..feed_forward import ACTIVATIONS, GATES, FeedForward
from ..part import BIAS, Part, WeightRule, reads_stream, writes_stream
from ..protocol import BlockKernels, TensorRole
from .charges import Charges, Tally
from .config import MixtureConfig
from .dispatch import Assignment, Dispatch, LocalJourney, sort_by_expert
from .grouped import Product, add_bias
from .replaceable import make_combine, make_dispatch, make_product, make_router
from .router import Carried, Router


class Experts(Part):
    """The routed experts: feed-forwards whose matrices are stacked along their rows.

    count    of the experts here: all of them, but for `keep`
    product  multiplies each expert's rows with its matrix
    w1, w3  gate and up of all experts: (E·F, D); w3 is None where they have no gate
    w2      down: (E·D, F)
    b1, b3, b2  their biases, (E·F,) and (E·D,); None without
    """

    def __init__(self, config: MixtureConfig) -> None:
        super().__init__()
        count, dim, width = config.keys.count, config.dim, config.expert.ffn_dim
        self.count = count
        self.w1 = nn.Parameter(torch.empty(count * width, dim))
        self.w2 = nn.Parameter(torch.empty(count * dim, width))
        gated = config.keys.gated
        self.w3 = nn.Parameter(torch.empty(count * width, dim)) if gated else None
        biases = {"b1": width, "b2": dim, **({"b3": width} if gated else {})} if config.expert.bias else {}
        for name in ("b1", "b2", "b3"):
            size = biases.get(name)
            self.register_parameter(name, None if size is None else nn.Parameter(torch.empty(count * size)))
        self.weight_rules: Mapping[str, WeightRule] = {
            **dict.fromkeys(biases, BIAS),
            **dict.fromkeys(("w1", "w3"), replace(reads_stream(config.scales), stacked=count)),
            "w2": replace(writes_stream(config.scales), stacked=count),
        }
        self._activation = config.expert.activation
        self.product: Product = make_product(config)
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
        inner_NF = self._projected(rows_ND, self.w1, self.b1, counts_E)
        if self.w3 is None:
            inner_NF = ACTIVATIONS[self._activation](inner_NF)
        else:
            up_NF = self._projected(rows_ND, self.w3, self.b3, counts_E)
            inner_NF = GATES[self._activation](inner_NF, up_NF)
        return self._projected(inner_NF, self.w2, self.b2, counts_E)

    def _projected(
        self, rows_NI: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, counts_E: torch.Tensor
    ) -> torch.Tensor:
        out_NO = self.product(rows_NI, weight.unflatten(0, (self.count, -1)), counts_E)
        return out_NO if bias is None else add_bias(out_NO, bias.unflatten(0, (self.count, -1)), counts_E)


class SharedExperts(FeedForward):
    """The feed-forward that every token passes. It is cut with the tokens, not by features."""

    tensor_roles: ClassVar[Mapping[str, TensorRole]] = {}


class Mixture(Part):
    """Routed experts, weighted by the router, plus the shared ones.

    dispatch  brings tokens to experts and back; a run may replace it
    sends_tokens  whether it brings them to other ranks
    combine   sums the outputs of a token's experts, weighted by its gates
    fused     the kernels to use where they fit; None: tokens are copied for their experts, and products are grouped
    """

    def __init__(self, config: MixtureConfig) -> None:
        super().__init__()
        self.config, self.keys = config, config.keys
        self.router = make_router(config)
        self.experts = Experts(config)
        self.shared = None if config.shared is None else SharedExperts(config.shared)
        self.dispatch: Dispatch = make_dispatch(config)
        self.sends_tokens = False
        self.combine = make_combine(config)
        self.fused: FusedExperts | None = None

    def use_kernels(self, kernels: BlockKernels) -> None:
        """Compute with these kernels from now on."""
        self.router.use_kernels(kernels.experts)
        self.fused = kernels.experts if self.config.can_fuse else None
        if self.shared is not None:
            self.shared.use_kernels(kernels)

    def num_inputs(self, x_BSD: torch.Tensor) -> int:
        """Count the readers of the input: the router, the experts, and the shared experts' products."""
        return 2 if self.shared is None else 2 + self.shared.num_inputs(x_BSD)

    def forward(
        self, inputs: Sequence[torch.Tensor], charges: Charges | None, carried: Carried | None = None
    ) -> tuple[torch.Tensor, Tally | None, torch.Tensor | None]:
        """Compute it. inputs: the same (B, S, D), `num_inputs` times; carried: by recurrent routers.

        Returns (B, S, D), the tally under charges, and the state (T, P) that goes to the next layer, if the router makes one.
        """
        routed_BSD, x_BSD, *rest = inputs
        x_TD = x_BSD.flatten(0, 1)
        routed = self.router(routed_BSD.flatten(0, 1), charges, carried)
        counted_T = None if charges is None else charges.counted_BS.flatten()
        choice_TK, taken_TK = routed.choice_TK, routed.taken_TK
        assignment = sort_by_expert(choice_TK, self.keys.count, self.keys.capacity, counted_T, taken_TK)
        if self._fuses(x_TD, assignment):
            y_BSD = self._fused(x_TD, routed.gates_TK, assignment).view_as(x_BSD)
            return y_BSD if self.shared is None else y_BSD + self.shared(rest), routed.tally, routed.state_TP
        journey = self.dispatch(assignment)
        shared_BSD = None if self.shared is None else self.shared(rest)  # while ranks tell each other what they will send
        rows_ND, counts_E = journey.send(x_TD)
        y_TKD = journey.back(self.experts(rows_ND, counts_E))
        y_BSD = self.combine(y_TKD, routed.gates_TK).view_as(x_BSD)
        if shared_BSD is not None:
            y_BSD = y_BSD + shared_BSD
        kept_TK = None if self.keys.capacity is None else assignment.kept_TK
        if kept_TK is not None and counted_T is not None and routed.tally is not None:
            dropped_TK = ~kept_TK if taken_TK is None else ~kept_TK & taken_TK
            routed.tally.others_O[2] = (dropped_TK & counted_T[:, None]).sum()
        return y_BSD, routed.tally, routed.state_TP

    def _fuses(self, x_TD: torch.Tensor, assignment: Assignment) -> bool:
        whole = self.dispatch is LocalJourney and assignment.kept_TK is None
        return self.fused is not None and whole and self.fused.fits(x_TD, self.experts.w1, self.experts.count)

    def _fused(self, x_TD: torch.Tensor, gates_TK: torch.Tensor, assignment: Assignment) -> torch.Tensor:
        """Compute the experts, and the sum of their outputs, by the fused kernels: (T, D)."""
        own, fused = self.experts, self.fused
        assert fused is not None and own.w3 is not None
        return fused(x_TD, own.w1, own.w3, own.w2, gates_TK, assignment.order_N, assignment.inverse_TK, assignment.counts_E)


def mixtures_of(module: nn.Module) -> dict[str, Mixture]:
    """Find the mixtures in a module, by name."""
    return {name: each for name, each in module.named_modules() if isinstance(each, Mixture)}


def experts_of(module: nn.Module) -> dict[str, Experts]:
    """Find the routed experts in a module, by name."""
    return {name: each for name, each in module.named_modules() if isinstance(each, Experts)}


def sends_tokens(module: nn.Module) -> bool:
    """Return whether a module's tokens travel to experts elsewhere."""
    return any(mixture.sends_tokens for mixture in mixtures_of(module).values())


def makes_choices(module: nn.Module) -> bool:
    """Return whether a module routes tokens: recomputation must then keep the choice."""
    return any(isinstance(each, Router) for each in module.modules())
