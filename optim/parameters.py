"""What an optimizer is given: named local shards, and the two questions it may ask about their other shards.

Engines own the sharding; optimizers own the mathematics. Rule R4 says that an update is defined on whole parameters, so
an optimizer whose update needs more than the local elements (a norm, a projection, an orthogonalisation) asks through
`Shards` and never learns what a rank is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(eq=False)
class NamedParameter:
    """One parameter as this rank holds it.

    name          canonical name
    tensor        local shard, a plain leaf Parameter; its `.grad` is the local shard of the gradient
    global_shape  shape of the whole parameter
    decay         whether weight decay applies (matrices yes; norms, biases and embeddings no)
    lr_scale      factor on the learning rate (muP); 1 otherwise
    """

    name: str
    tensor: torch.nn.Parameter
    global_shape: tuple[int, ...]
    decay: bool = True
    lr_scale: float = 1.0


class Shards(Protocol):
    """Questions about the shards of the same parameters that other ranks hold. Every rank must ask the same, in order."""

    def sum(self, values: torch.Tensor, parameters: Sequence[NamedParameter]) -> torch.Tensor:
        """values (len(parameters), …): per-parameter sums over local elements → the same over all shards of each.

        Replicas are counted once. One collective for the whole batch of values. `parameters` are those this rank
        was given, or a subset of them chosen by a rule that is the same on every rank.
        """
        ...

    def gather(self, parameter: NamedParameter, local: torch.Tensor) -> torch.Tensor:
        """local (a tensor shaped as the local shard) → the whole array (global_shape)."""
        ...

    def scatter(self, parameter: NamedParameter, whole: torch.Tensor) -> torch.Tensor:
        """whole (global_shape) → the part of it that lies in this rank's shard. No communication."""
        ...


class Unsharded:
    """Shards of parameters that are whole on this rank: every sum is already global."""

    def sum(self, values: torch.Tensor, parameters: Sequence[NamedParameter]) -> torch.Tensor:
        """values, unchanged."""
        return values

    def gather(self, parameter: NamedParameter, local: torch.Tensor) -> torch.Tensor:
        """local, unchanged."""
        return local

    def scatter(self, parameter: NamedParameter, whole: torch.Tensor) -> torch.Tensor:
        """whole, unchanged."""
        return whole


def decay_groups(parameters: Sequence[NamedParameter], weight_decay: float) -> list[dict[str, object]]:
    """Parameter groups for a `torch.optim.Optimizer`: one per (decayed?, lr_scale), in a fixed order.

    Each group carries `lr_scale` (the engine multiplies the scheduled rate by it) and `names`, parallel to `params`.
    """
    keys = sorted({(parameter.decay, parameter.lr_scale) for parameter in parameters}, reverse=True)
    groups: list[dict[str, object]] = []
    for decay, lr_scale in keys:
        members = [p for p in parameters if (p.decay, p.lr_scale) == (decay, lr_scale)]
        groups.append(
            {
                "params": [member.tensor for member in members],
                "names": [member.name for member in members],
                "weight_decay": weight_decay if decay else 0.0,
                "lr_scale": lr_scale,
            }
        )
    return groups
