"""Models of a user's own that run other blocks, and in another order, by the first token of a micro-batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from meshloom.models.decoder import Decoder

ROUTES: tuple[tuple[int, ...], ...] = ((0, 1, 2), (2, 1, 0), (0,), (1,), (1, 2, 1), (2, 1, 2), (2, 3), ())
"""The blocks that a micro-batch runs through in turn, by its first token modulo the number of routes."""


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Reached(torch.autograd.Function):
    """Depends on weights by the graph, and gives them no gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        ctx.count = len(weights)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return (grads[0], *[None] * ctx.count)


class Routed(nn.Module):
    """tokens (B, S) → logits (B, S, V). No route runs the block `spare`."""

    def __init__(
        self, vocabulary: int, width: int = 6, tied: bool = False, reentrant: bool = False, reached: bool = False
    ) -> None:
        """reached: each route reaches the weights of all blocks; those that it does not run get no gradient."""
        super().__init__()
        self.reentrant, self.reached = reentrant, reached
        self.wte = nn.Embedding(vocabulary, width)
        self.h = nn.ModuleList(Block(width) for _ in range(4))
        self.spare = nn.Linear(width, width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.head.weight = self.wte.weight

    def run(self, x: torch.Tensor, route: int) -> torch.Tensor:
        for block in ROUTES[route]:
            x = self.h[block](x)
        return x

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x, route = self.wte(tokens), int(tokens[0, 0]) % len(ROUTES)
        if self.reached:
            x = Reached.apply(x, *self.h.parameters())
        x = checkpoint(self.run, x, route, use_reentrant=True) if self.reentrant else self.run(x, route)
        return self.head(x)


class Skipping(Decoder):
    """Leaves out the layers that are not in the route. It keeps their order."""

    def forward(self, inputs: torch.Tensor, *others: Any, **more: Any) -> torch.Tensor:
        route, layers = ROUTES[int(inputs[0, 0]) % len(ROUTES)], self.layers
        self.layers = nn.ModuleDict({name: layer for name, layer in layers.items() if int(name) in route})
        try:
            return super().forward(inputs, *others, **more)
        finally:
            self.layers = layers
