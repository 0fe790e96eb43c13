"""How a group's weights are held: the methods that every way has, in the order in which an engine calls them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ...models.protocol import Model
from ..shards import Placed


@dataclass(frozen=True)
class LocalWeight:
    """One weight, as its strategy holds it on this rank.

    placed        the parameter that is computed with, and the box of the whole weight that this rank updates
    tensor        what the optimizer updates and checkpoints store: that box, a plain tensor
    compute_copy  the rows of the parameter that hold the same box, where they are a tensor of another dtype
    """

    placed: Placed
    tensor: nn.Parameter
    compute_copy: torch.Tensor | None = None


class WeightStrategy:
    """A way to hold one group's weights. What a strategy does not override it has no need of, but for the four that raise.

    local  by name, the group's weights on this rank; filled by `adopt`
    """

    def __init__(self) -> None:
        self.local: dict[str, LocalWeight] = {}

    def shard(self, stage: Model) -> None:
        """Cut the group's weights in a stage, on the meta device, over the ranks; give this rank's part memory."""
        raise NotImplementedError

    def adopt(self, stages: Sequence[Model], named: Mapping[str, nn.Parameter]) -> None:
        """Take charge of the group's parameters in the sharded stages. named: all parameters of theirs."""
        raise NotImplementedError

    def watch(self, see: Callable[[str, nn.Parameter], None]) -> None:
        """Call `see` with every weight that gradients are computed of, before it is used; it may be called again."""
        raise NotImplementedError

    def begin_step(self, *, single: bool, fused: bool) -> None:
        """Before a step's first forward pass.

        single: no rank runs more than one micro-batch. fused: the optimizer takes gradients in the dtype of the compute.
        """

    def set_last_micro_batch(self, last: bool) -> None:
        """Before a micro-batch's forward pass. last: gradients must be complete on all ranks after it."""

    def wait_reduce(self) -> None:
        """After a last micro-batch: until every `tensor` has its gradient, summed over all ranks."""
        raise NotImplementedError

    def wait_all_gather(self, *, compute_copies: bool) -> None:
        """Until no gather touches `tensor`, before it is read or written. compute_copies: they will be written, too."""

    def all_gather_weights(self, *, copied: bool) -> None:
        """After an update: begin to make the weights whole. copied: the optimizer has written every `compute_copy`."""

    def sync_from_masters(self) -> None:
        """Before an evaluation: bring the weights up to date."""

    def reshard(self) -> None:
        """After an evaluation: free what was gathered for it."""

    def masters_written(self) -> None:
        """Note that another than the optimizer has written to every `tensor`, on every rank."""
