"""The cell of recurrent routers in a pipeline: all stages with a mixture use it. The first of them owns it, others hold copies.

As of a tied head (`tied_head.py`), only the owner's shard is initialised, updated, counted and saved. Every pass begins with a
fetch, and after a backward pass the gradients of all copies are added to the owner's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import nn

from ...models.config import DecoderConfig
from ...models.protocol import Model
from ..mesh import Mesh
from ..shards import local
from .stages import StagePlan, cell_stages

CELL = "router_cell."


def own_parameters(stages: Mapping[int, Model], shape: DecoderConfig | None, plan: StagePlan) -> dict[str, nn.Parameter]:
    """List the parameters of a rank's stages by name, without copies of the cell that another stage owns."""
    owner = None if shape is None else next(iter(cell_stages(shape, plan)), None)
    return {
        name: parameter
        for index, stage in stages.items()
        for name, parameter in stage.named_parameters()
        if index == owner or not name.startswith(CELL)
    }


class SharedCell:
    """See the module's docstring."""

    def __init__(self, mesh: Mesh, plan: StagePlan, shape: DecoderConfig, stages: Mapping[int, Model]) -> None:
        """stages: this rank's, sharded, by index."""
        holders = cell_stages(shape, plan)
        owner = holders[0]
        self._group, self._rank, self._from = mesh.group("pp"), mesh.coordinates["pp"], plan.ranks[owner]
        self._others = sorted({plan.ranks[index] for index in holders} - {self._from})
        held = {index: _cell(stage) for index, stage in stages.items() if index in holders}
        self._owned = held.pop(owner, None)
        self._copies = list(held.values())

    @torch.no_grad()
    def fetch(self) -> None:
        """Copy the owner's weights to every other stage with a mixture."""
        if self._owned is None and not self._copies:
            return
        like = self._copies[0] if self._owned is None else self._owned
        values = _flat([local(weight) for weight in like])
        if values.numel():
            for other in self._others if self._rank == self._from else ():
                dist.send(values, group=self._group, group_dst=other)
            if self._rank != self._from:
                dist.recv(values, group=self._group, group_src=self._from)
        for copy in self._copies:
            for weight, value in zip(copy, _cut(values, copy), strict=True):
                local(weight).copy_(value)

    @torch.no_grad()
    def return_gradient(self) -> None:
        """Add the copies' gradients to the owner's, and discard them."""
        if self._owned is None and not self._copies:
            return
        total = (
            torch.stack([_flat([_taken(weight) for weight in copy]) for copy in self._copies]).sum(0) if self._copies else None
        )
        if self._owned is None:
            assert total is not None
            if total.numel():
                dist.send(total, group=self._group, group_dst=self._from)
            return
        gradients = [weight.grad for weight in self._owned]
        mine = [local(gradient) for gradient in gradients if gradient is not None]
        assert len(mine) == len(gradients), "the owner's stage has a mixture, which uses the cell"
        arrived = [] if total is None else [total]
        if self._owned and (like := _flat(mine)).numel():
            for other in self._others:
                arrived.append(torch.empty_like(like))
                dist.recv(arrived[-1], group=self._group, group_src=other)
        for values in arrived:
            for gradient, value in zip(mine, _cut(values, self._owned), strict=True):
                gradient += value


def _cell(stage: Model) -> list[nn.Parameter]:
    return [parameter for name, parameter in stage.named_parameters() if name.startswith(CELL)]


def _taken(weight: nn.Parameter) -> torch.Tensor:
    """Return this rank's part of a copy's gradient, and discard it there."""
    gradient, weight.grad = weight.grad, None
    return torch.zeros_like(local(weight)) if gradient is None else local(gradient)


def _flat(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def _cut(values: torch.Tensor, like: Sequence[nn.Parameter]) -> list[torch.Tensor]:
    """Cut a flat tensor into the parts of weights on this rank."""
    parts = values.split([local(weight).numel() for weight in like])
    return [part.view_as(local(weight)) for part, weight in zip(parts, like, strict=True)]
