"""The feed-forward part of a block.

Shape legend: B batch, S sequence, D model width, F feed-forward width, T = B·S tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from ..kernels.swiglu import FusedSwiglu
from .part import Part, reads_stream, writes_stream
from .part_config import FeedForwardConfig
from .protocol import BlockKernels, TensorRole

Gate = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""From the outputs of gate and up to the input of down."""

CLAMPED_SLOPE, CLAMPED_LIMIT = 1.702, 7.0


def _product(activation: Callable[[torch.Tensor], torch.Tensor]) -> Gate:
    return lambda gate, up: activation(gate) * up


def clamped_swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Compute gate · sigmoid(1.702 gate) · (up + 1), of a gate clamped from above and an up from both sides (gpt-oss)."""
    gate, up = gate.clamp(max=CLAMPED_LIMIT), up.clamp(-CLAMPED_LIMIT, CLAMPED_LIMIT)
    return gate * torch.sigmoid(CLAMPED_SLOPE * gate) * (up + 1)


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "gelu": F.gelu,
}
"""Activations without a gate, by their name in the config."""

GATES: dict[str, Gate] = {
    **{name: _product(activation) for name, activation in ACTIVATIONS.items()},
    "clamped_swiglu": clamped_swiglu,
}
"""Gates by the name of the activation in the config."""


class FeedForward(Part):
    """A gated feed-forward: w2(activation(w1 x) · w3 x), SwiGLU or GeGLU (arXiv 2002.05202).

    swiglu  the kernels to use where they fit; None: the formula in PyTorch's operations
    """

    tensor_roles: ClassVar[Mapping[str, TensorRole]] = {
        "w1": TensorRole.COLUMN,
        "w2": TensorRole.ROW,
        "w3": TensorRole.COLUMN,
    }

    def __init__(self, config: FeedForwardConfig) -> None:
        super().__init__()
        self.config = config
        self.w1 = nn.Linear(config.dim, config.ffn_dim, bias=config.bias)
        self.w2 = nn.Linear(config.ffn_dim, config.dim, bias=config.bias)
        self.w3 = nn.Linear(config.dim, config.ffn_dim, bias=config.bias)
        self.weight_rules = {
            **dict.fromkeys(("w1", "w3"), reads_stream(config.scales)),
            "w2": writes_stream(config.scales),
        }
        self._gate = GATES[config.activation]
        self.swiglu: FusedSwiglu | None = None

    def use_kernels(self, kernels: BlockKernels) -> None:
        """Compute with these kernels from now on."""
        self.swiglu = kernels.swiglu

    def num_inputs(self, x_BSD: torch.Tensor) -> int:
        """Count the products that take the input: gate's and up's, or one fused product."""
        fits = self.swiglu is not None and self.config.is_plain_swiglu and self.swiglu.fits(x_BSD, self.w1.weight)
        return 1 if fits else 2

    def forward(self, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        """Compute it. inputs: the same (B, S, D), `num_inputs` times. Returns (B, S, D)."""
        if len(inputs) == 1:
            assert self.swiglu is not None
            x_BSD = inputs[0]
            y_TD = self.swiglu(x_BSD.flatten(0, -2), self.w1.weight, self.w3.weight, self.w2.weight)
            return y_TD.view_as(x_BSD)
        gate_BSD, up_BSD = inputs
        return self.w2(self._gate(self.w1(gate_BSD), self.w3(up_BSD)))
