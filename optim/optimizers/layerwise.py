"""LAMB and LARS: every matrix has a learning rate of its own, from the norms of the whole matrix (rule R4).

Of parameters that stack several matrices, as a mixture's experts do, each matrix counts by itself.

The squared norms of all matrices are summed in one collective. Vectors (norms, biases) are updated without a trust ratio.
"""

# pyright: reportPrivateImportUsage=false
# torch does not export its operations on lists (_foreach_…), which its own optimizers use.

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .config import LAMBConfig, LARSConfig, base_rate
from .parameters import NamedParameter, Shards, decay_groups, members_with_gradients


@dataclass
class _Slice:
    """The members of one parameter group that have a gradient, as parallel lists."""

    group: dict[str, Any]
    members: list[NamedParameter]
    weights: list[torch.Tensor]
    gradients: list[torch.Tensor]
    states: list[dict[str, Any]]

    def zeros(self, role: str) -> list[torch.Tensor]:
        """Return each member's state array of this name, made of zeros where there is none."""
        for weight, state in zip(self.weights, self.states, strict=True):
            if role not in state:
                state[role] = torch.zeros_like(weight)
        return [state[role] for state in self.states]


class _Layerwise(torch.optim.Optimizer):
    """Base of both: groups, gradients, and norms of whole matrices."""

    def __init__(
        self, parameters: Sequence[NamedParameter], shards: Shards, weight_decay: float, defaults: dict[str, Any]
    ) -> None:
        self._shards = shards
        self._by_name = {parameter.name: parameter for parameter in parameters}
        super().__init__(decay_groups(parameters, weight_decay), defaults)

    def _slices(self) -> list[_Slice]:
        slices: list[_Slice] = []
        for group in self.param_groups:
            members, weights, gradients = members_with_gradients(group, self._by_name)
            if members:
                slices.append(_Slice(group, members, weights, gradients, [self.state[weight] for weight in weights]))
        return slices

    def _norms(self, slices: Sequence[_Slice], *of: Sequence[Sequence[torch.Tensor]]) -> list[list[torch.Tensor]]:
        """Compute the norms of whole matrices: (stacked, kinds) for each member of each slice, in fp64.

        of: kinds of tensors, each a list per slice. A vector's entry is a tensor of no elements.
        """
        matrices = [(s, m) for s, piece in enumerate(slices) for m in range(len(piece.members)) if _is_matrix(piece.members[m])]
        norms = [[torch.empty(0)] * len(piece.members) for piece in slices]
        if matrices:
            members = [slices[s].members[m] for s, m in matrices]
            squares = torch.stack([_squares(members, [kind[s][m] for s, m in matrices]) for kind in of], dim=1)
            whole = self._shards.sum(squares, [member for member in members for _ in range(member.stacked)]).sqrt()
            for (s, m), rows in zip(matrices, whole.split([member.stacked for member in members]), strict=True):
                norms[s][m] = rows
        return norms

    @staticmethod
    def _factors(
        members: list[NamedParameter], norms: list[torch.Tensor], rule: Callable[..., torch.Tensor]
    ) -> list[torch.Tensor]:
        """Compute the factor of each member: `rule` of a matrix's norms, for the rows of each stacked one; 1 for a vector."""

        def factor(member: NamedParameter, rows: torch.Tensor) -> torch.Tensor:
            if not rows.numel():
                return member.tensor.new_ones(())
            factors = rule(*rows.unbind(1)).to(member.tensor.dtype)
            return factors[0] if member.stacked == 1 else factors[member.matrix_of_rows()][:, None]

        return [factor(member, rows) for member, rows in zip(members, norms, strict=True)]


def _squares(members: Sequence[NamedParameter], tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Sum the squares of this rank's part of each member's matrices, one after another, in fp64."""
    single = [tensor for member, tensor in zip(members, tensors, strict=True) if member.stacked == 1]
    norms = iter(torch._foreach_norm(single) if single else ())

    def of(member: NamedParameter, tensor: torch.Tensor) -> torch.Tensor:
        if member.stacked == 1:
            return next(norms).double().square()[None]
        sums = torch.zeros(member.stacked, dtype=torch.float64, device=tensor.device)
        return sums.index_add_(0, member.matrix_of_rows(), tensor.square().sum(1, dtype=torch.float64))

    return torch.cat([of(member, tensor) for member, tensor in zip(members, tensors, strict=True)])


def _is_matrix(parameter: NamedParameter) -> bool:
    return len(parameter.global_shape) >= 2


class LAMB(_Layerwise):
    """Layer-wise adaptive moments for large batches (You et al., arXiv 1904.00962).

    u = m̂ / (√v̂ + eps) + weight_decay · w;  w ← w − lr · (φ(‖w‖) / ‖u‖) · u, the ratio being 1 where a norm is 0.

    bias_correction  of the moments; the paper's third version leaves it out
    norm_max         φ(z) = min(z, norm_max); None: φ(z) = z
    """

    def __init__(self, config: LAMBConfig, parameters: Sequence[NamedParameter], shards: Shards) -> None:
        first, second = config.betas
        self._bias_correction = config.bias_correction
        self._norm_max = config.norm_max
        defaults = {"lr": base_rate(config), "betas": (first, second), "eps": config.eps}
        super().__init__(parameters, shards, config.weight_decay, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take one update, with one collective."""
        assert closure is None
        slices = self._slices()
        updates = [self._direction(piece) for piece in slices]
        norms = self._norms(slices, [piece.weights for piece in slices], updates)
        for piece, update, rows in zip(slices, updates, norms, strict=True):
            torch._foreach_mul_(update, self._factors(piece.members, rows, self._trust))
            torch._foreach_add_(piece.weights, update, alpha=-piece.group["lr"])

    def _direction(self, piece: _Slice) -> list[torch.Tensor]:
        """Compute u, one tensor per member."""
        first, second = piece.group["betas"]
        means, squares = piece.zeros("exp_avg"), piece.zeros("exp_avg_sq")
        for state in piece.states:
            state["step"] = state.get("step", 0) + 1
        torch._foreach_lerp_(means, piece.gradients, 1 - first)
        torch._foreach_mul_(squares, second)
        torch._foreach_addcmul_(squares, piece.gradients, piece.gradients, 1 - second)
        steps = piece.states[0]["step"]
        mean_left, square_left = (1 - first**steps, 1 - second**steps) if self._bias_correction else (1.0, 1.0)
        scale = torch._foreach_div(squares, square_left)
        torch._foreach_sqrt_(scale)
        torch._foreach_add_(scale, piece.group["eps"])
        update = torch._foreach_div(means, mean_left)
        torch._foreach_div_(update, scale)
        if piece.group["weight_decay"]:
            torch._foreach_add_(update, piece.weights, alpha=piece.group["weight_decay"])
        return list(update)

    def _trust(self, weight: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
        """Compute φ(‖w‖) / ‖u‖ from the norms, 1 where one is 0."""
        bounded = weight if self._norm_max is None else weight.clamp(max=self._norm_max)
        return torch.where((weight > 0) & (update > 0), bounded / update, 1.0)


class LARS(_Layerwise):
    """Layer-wise adaptive rate scaling (You et al., arXiv 1708.03888): momentum SGD with a rate per matrix.

    λ = trust · ‖w‖ / (‖g‖ + weight_decay · ‖w‖), and 1 where a norm is 0;
    v ← momentum · v + lr · λ · (g + weight_decay · w);  w ← w − v
    """

    def __init__(self, config: LARSConfig, parameters: Sequence[NamedParameter], shards: Shards) -> None:
        self._momentum = config.momentum
        self._trust = config.trust
        super().__init__(parameters, shards, config.weight_decay, {"lr": base_rate(config)})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take one update, with one collective."""
        assert closure is None
        slices = self._slices()
        norms = self._norms(slices, [piece.weights for piece in slices], [piece.gradients for piece in slices])
        for piece, rows in zip(slices, norms, strict=True):
            decay = piece.group["weight_decay"]

            def rate(weight: torch.Tensor, gradient: torch.Tensor, decay: float = decay) -> torch.Tensor:
                whole = self._trust * weight / (gradient + decay * weight)
                return torch.where((weight > 0) & (gradient > 0), whole, 1.0)

            velocity = piece.zeros("momentum_buffer")
            move = torch._foreach_add(piece.gradients, piece.weights, alpha=decay)
            torch._foreach_mul_(move, self._factors(piece.members, rows, rate))
            torch._foreach_mul_(velocity, self._momentum)
            torch._foreach_add_(velocity, move, alpha=piece.group["lr"])
            torch._foreach_sub_(piece.weights, velocity)
