"""A recurrent router across layers (RMoE, arXiv 2408.06793).

A token's state passes from one mixture to the next. Each layer projects the token to the state's width, and a gated recurrent
unit, which all layers share, takes the projection and the last state to the next state. Its logits are linear in that. The
first state is zero.

Shape legend: T tokens, D model width, P width of the state, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from ..init import Normal
from ..part import BIAS, Part, WeightRule, reads_stream
from .charges import Charges
from .config import MixtureConfig
from .router import Carried, CellWeights, Routed, TopKRouter


class RecurrentCell(Part):
    """The weights of the unit that the recurrent routers of a model share, in the layout of `torch.nn.GRUCell`.

    Their initial variance is that of PyTorch's uniform distribution, 1 / (3 P).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight_ih = nn.Parameter(torch.empty(3 * width, width))
        self.weight_hh = nn.Parameter(torch.empty(3 * width, width))
        self.bias_ih = nn.Parameter(torch.empty(3 * width))
        self.bias_hh = nn.Parameter(torch.empty(3 * width))
        matrices = WeightRule(Normal(1 / math.sqrt(3 * width)), stacked=3)
        self.weight_rules: Mapping[str, WeightRule] = {
            **dict.fromkeys(("weight_ih", "weight_hh"), matrices),
            **dict.fromkeys(("bias_ih", "bias_hh"), BIAS),
        }

    def forward(self) -> CellWeights:
        """Return the weights, whole: calling the module is what gathers them."""
        return CellWeights(self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)


def next_state(input_TP: torch.Tensor, state_TP: torch.Tensor, cell: CellWeights) -> torch.Tensor:
    """Compute the next state of a gated recurrent unit, as `torch.nn.GRUCell` does (arXiv 1406.1078)."""
    of_input = F.linear(input_TP, cell.weight_ih, cell.bias_ih).chunk(3, -1)
    of_state = F.linear(state_TP, cell.weight_hh, cell.bias_hh).chunk(3, -1)
    reset, update = (torch.sigmoid(one + other) for one, other in zip(of_input[:2], of_state[:2], strict=True))
    return torch.lerp(torch.tanh(of_input[2] + reset * of_state[2]), state_TP, update)


class RecurrentRouter(TopKRouter):
    """Chooses by the state that layers hand on. `weight` is (E, P), `project` (P, D).

    A state is rounded to the dtype of the stream at the end of each layer, so that what passes between pipeline stages is what
    passes inside of one.
    """

    def __init__(self, config: MixtureConfig) -> None:
        super().__init__(config)
        width = config.keys.state_dim
        self.project = nn.Parameter(torch.empty(width, config.dim))
        self.weight = nn.Parameter(torch.empty(config.keys.count, width))
        scores = WeightRule(Normal(1 / math.sqrt(3 * width)))
        self.weight_rules = {**self.weight_rules, "project": reads_stream(config.scales), "weight": scores}

    def forward(self, x_TD: torch.Tensor, charges: Charges | None, carried: Carried | None = None) -> Routed:
        """See `Router`. carried: what the decoder makes for a model with such routers."""
        assert carried is not None, "a recurrent router has a state, be it zero"
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        input_TP = F.linear(x_TD.to(wide), self.project.to(wide))
        cell = CellWeights(*(weight.to(wide) for weight in carried.cell))
        state_TP = next_state(input_TP, carried.state_TP.to(wide), cell).to(x_TD.dtype)
        return self.route(self.linear(state_TP.to(wide)), charges)._replace(state_TP=state_TP)
