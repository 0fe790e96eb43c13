"""Tensor parallelism inside attention: modules that work on a rank's own heads, where these are shared or normed.

Their inputs and outputs are plain tensors of this rank's heads. A weight of which every rank has the whole, and uses the part
that belongs to its heads, has a gradient that is zero elsewhere: declared partial, the sum over ranks is the whole gradient.

Shape legend: B batch, S sequence, D model width, E width of this rank's heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed import _functional_collectives as funcol
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial

from ...models.norm import Norm


class HeadsWork(Enum):
    """The work of a module on heads: project to them, norm each by itself or those of all ranks together, or hold numbers."""

    PROJECT = "project"
    NORM_EACH = "norm_each"
    NORM_ALL = "norm_all"
    VECTOR = "vector"


@dataclass(frozen=True)
class Heads:
    """The division over ranks of the heads that a module works on.

    head_dim  width of a head
    shared    number of heads, where they are fewer than ranks: each rank then computes the one head that it needs
    work      what the module does
    """

    head_dim: int
    shared: int | None
    work: HeadsWork

    def rows(self, mesh: DeviceMesh) -> slice:
        """Return the rows of a whole weight that belong to this rank's shared head."""
        assert self.shared is not None
        head = mesh.get_local_rank() * self.shared // mesh.size()
        return slice(head * self.head_dim, (head + 1) * self.head_dim)


def work_on_heads(module: nn.Module, heads: Heads, mesh: DeviceMesh) -> None:
    """Make a module, whose parameters are DTensors, compute with the part that belongs to this rank's heads."""
    match heads.work:
        case HeadsWork.PROJECT:
            _project(cast(nn.Linear, module), heads, mesh)
        case HeadsWork.NORM_EACH:
            _norm_each(cast(Norm, module))
        case HeadsWork.NORM_ALL:
            _norm_all(cast(Norm, module), heads, mesh)
        case HeadsWork.VECTOR:
            module.forward = lambda: _own(module.weight, heads, mesh)


def _own(parameter: Any, heads: Heads, mesh: DeviceMesh) -> torch.Tensor:
    """Return the part of a parameter that belongs to this rank's heads."""
    if heads.shared is None:
        return parameter.to_local()
    return parameter.to_local(grad_placements=[Partial()])[heads.rows(mesh)]


def _project(module: nn.Linear, heads: Heads, mesh: DeviceMesh) -> None:
    """Project to the shared key/value head that this rank needs."""

    def forward(x_BSD: DTensor) -> torch.Tensor:
        bias_E = None if cast(Any, module.bias) is None else _own(module.bias, heads, mesh)
        return F.linear(x_BSD.to_local(grad_placements=[Partial()]), _own(module.weight, heads, mesh), bias_E)

    cast(nn.Module, module).forward = forward


def _norm_each(norm: Norm) -> None:
    """Norm each of this rank's heads. All heads have the same weight."""

    def forward(x: torch.Tensor) -> torch.Tensor:
        weight: Any = norm.weight
        return norm.apply_weight(x, weight.to_local(grad_placements=[Partial()]))

    norm.forward = forward


def _norm_all(norm: Norm, heads: Heads, mesh: DeviceMesh) -> None:
    """Norm the heads of all ranks together: ranks exchange one number per token, the sum of squares."""
    group = mesh.get_group()
    copies = 1 if heads.shared is None else mesh.size() // heads.shared

    def forward(x: torch.Tensor) -> torch.Tensor:
        wide_BSE = x.to(torch.promote_types(x.dtype, torch.float32))
        square_BS1 = _sum_over(wide_BSE.square().sum(-1, keepdim=True), group) / (copies * norm.config.width)
        factor_E = norm.factor(_own(norm.weight, heads, mesh)).to(wide_BSE.dtype)
        return (wide_BSE * (square_BS1 + norm.config.eps).rsqrt() * factor_E).to(x.dtype)

    norm.forward = forward


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return funcol.wait_tensor(funcol.all_reduce(x, "sum", group))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return funcol.wait_tensor(funcol.all_reduce(gradient.contiguous(), "sum", ctx.group)), None


def _sum_over(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Sum over ranks, each of which uses the sum for a loss of its own: its gradient is the sum of theirs."""
    return cast(torch.Tensor, _Sum.apply(x, group))
