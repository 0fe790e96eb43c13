"""A head tied to an embedding on another stage. The first stage owns the weight; the last stage holds a copy."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from ..mesh import Mesh
from ..shards import local
from .stages import StagePlan


class TiedHead:
    """See the module's docstring.

    Only the owner's shard is initialised, updated, counted and saved. Every pass begins with a fetch, and after a backward
    pass the copy's gradient is added to the owner's.
    """

    @classmethod
    def of(cls, mesh: Mesh, plan: StagePlan, named: dict[str, nn.Parameter]) -> TiedHead:
        """Make the tied head, and remove the copy from the named parameters: it is not a parameter of the model."""
        return cls(mesh, plan, named.get("embed.weight"), named.pop("head.weight", None))

    def __init__(self, mesh: Mesh, plan: StagePlan, owner: nn.Parameter | None, copy: nn.Parameter | None) -> None:
        """owner, copy: the sharded parameters on the ranks that hold the first and the last stage; None on others."""
        self._group, self._owner, self._copy = mesh.group("pp"), owner, copy
        self._from, self._to = plan.ranks[0], plan.ranks[-1]

    def _move(self, tensor: torch.Tensor, source: int, target: int, *, sends: bool) -> None:
        if tensor.numel() == 0:
            return
        if sends:
            dist.send(tensor.contiguous(), group=self._group, group_dst=target)
        else:
            dist.recv(tensor, group=self._group, group_src=source)

    @torch.no_grad()
    def fetch(self) -> None:
        """Copy the owner's weight to the last stage."""
        if self._owner is not None and self._copy is not None:
            local(self._copy).copy_(local(self._owner))
        elif self._owner is not None:
            self._move(local(self._owner), self._from, self._to, sends=True)
        elif self._copy is not None:
            self._move(local(self._copy), self._from, self._to, sends=False)

    @torch.no_grad()
    def return_gradient(self) -> None:
        """Add the copy's gradient to the owner's, and discard it."""
        gradient = None
        if self._copy is not None:
            assert self._copy.grad is not None
            gradient, self._copy.grad = local(self._copy.grad), None
            if self._owner is None:
                self._move(gradient, self._to, self._from, sends=True)
        if self._owner is not None:
            assert self._owner.grad is not None
            total = local(self._owner.grad)
            if gradient is None:
                gradient = torch.empty_like(total)
                self._move(gradient, self._to, self._from, sends=False)
            total += gradient
