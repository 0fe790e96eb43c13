"""A head tied to an embedding on another stage. The weight has one home, the first stage; the last stage borrows it."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from ..mesh import Mesh
from ..shards import local
from .stages import StagePlan


class TiedHead:
    """See the module's docstring.

    Only the home's shard is initialised, updated, counted and saved. Every pass begins with a fetch, and after a backward
    pass the borrowed copy's gradient is added to the home's.
    """

    @classmethod
    def of(cls, mesh: Mesh, plan: StagePlan, named: dict[str, nn.Parameter]) -> TiedHead:
        """The head of these parameters, from which the borrowed copy is taken out: it is none of the model's own."""
        return cls(mesh, plan, named.get("embed.weight"), named.pop("head.weight", None))

    def __init__(self, mesh: Mesh, plan: StagePlan, home: nn.Parameter | None, borrowed: nn.Parameter | None) -> None:
        """home, borrowed: the sharded parameters on the ranks that hold the first and the last stage; None on others."""
        self._group, self._home, self._borrowed = mesh.group("pp"), home, borrowed
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
        """Bring the home's weight to the borrowed copy."""
        if self._home is not None and self._borrowed is not None:
            local(self._borrowed).copy_(local(self._home))
        elif self._home is not None:
            self._move(local(self._home), self._from, self._to, sends=True)
        elif self._borrowed is not None:
            self._move(local(self._borrowed), self._from, self._to, sends=False)

    @torch.no_grad()
    def give_gradient(self) -> None:
        """Add the borrowed copy's gradient to the home's, and forget it."""
        borrowed = None
        if self._borrowed is not None:
            assert self._borrowed.grad is not None
            borrowed, self._borrowed.grad = local(self._borrowed.grad), None
            if self._home is None:
                self._move(borrowed, self._to, self._from, sends=True)
        if self._home is not None:
            assert self._home.grad is not None
            own = local(self._home.grad)
            if borrowed is None:
                borrowed = torch.empty_like(own)
                self._move(borrowed, self._to, self._from, sends=False)
            own += borrowed
