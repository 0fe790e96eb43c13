"""The interface of weight strategies: how a group's weights are held. An engine calls the methods in their order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ...kernels.rounding import KeptWeight
from ...models.protocol import Model
from ..fragment import Fragment
from ..shards import Placed


@dataclass(frozen=True)
class LocalWeight:
    """One weight, as its strategy holds it on this rank.

    placed        the parameter that is computed with, and the box of the whole weight that this rank updates
    tensor        what the optimizer updates and checkpoints store: that box, a plain tensor
    compute_copy  the rows of the parameter that hold the same box, where they are a tensor of another dtype
    rounded       whether the compute copy is what checkpoints store: `tensor` exists only during an update
    """

    placed: Placed
    tensor: nn.Parameter
    compute_copy: torch.Tensor | None = None
    rounded: bool = False


class WeightStrategy:
    """A way to hold one group's weights. The four methods that raise must be overridden; the others do nothing by default.

    local  by name, the group's weights on this rank; filled by `adopt`
    """

    def __init__(self) -> None:
        self.local: dict[str, LocalWeight] = {}

    def shard(self, stage: Model) -> None:
        """Shard the group's weights in a stage, on the meta device, over the ranks, and allocate this rank's part."""
        raise NotImplementedError

    def adopt(self, stages: Sequence[Model], named: Mapping[str, nn.Parameter]) -> None:
        """Register the group's parameters in the sharded stages. named: all parameters of the stages."""
        raise NotImplementedError

    def watch(self, see: Callable[[str, nn.Parameter], None]) -> None:
        """Call `see` with every weight that has a gradient, before it is used. It may be called again for the same weight."""
        raise NotImplementedError

    def begin_step(self, *, single: bool, fused: bool) -> None:
        """Prepare for a step, before its first forward pass.

        single: no rank runs more than one micro-batch. fused: the optimizer takes gradients in the dtype of the compute.
        """

    def set_last_micro_batch(self, last: bool) -> None:
        """Announce a micro-batch, before its forward pass. last: gradients must be complete on all ranks after it."""

    def begin_backward(self, loss: torch.Tensor) -> None:
        """Prepare for the backward pass of a micro-batch, from its loss."""

    def wait_reduce(self) -> None:
        """Wait, after a last micro-batch, until every `tensor` has its gradient, summed over all ranks."""
        raise NotImplementedError

    def wait_all_gather(self, *, compute_copies: bool) -> None:
        """Wait until no all-gather uses `tensor`, before it is read or written. compute_copies: they will be written, too."""

    def begin_update(self, *, rounded: bool) -> Mapping[torch.Tensor, KeptWeight]:
        """Make every `tensor` exist, with the weights' values, before an update.

        rounded: the optimizer can do without some. Then return what it updates in their place, by `tensor`.
        """
        return {}

    def fragments(self) -> Iterator[Fragment]:
        """Yield what checkpoints store of the weights besides their values."""
        yield from ()

    def counters(self) -> dict[str, float]:
        """Return what checkpoints store of the weights as numbers: the same in every group, and on every rank."""
        return {}

    def load_counters(self, counters: Mapping[str, float]) -> None:
        """Set those of them that a restore has brought. counters: may hold others, too."""

    def all_gather_weights(self, *, copied: bool) -> None:
        """Start, after an update, to all-gather the weights. copied: the optimizer has written every `compute_copy`."""

    def sync_from_masters(self) -> None:
        """Bring the weights up to date with their masters, before an evaluation."""

    def reshard(self) -> None:
        """Free the weights that were gathered for an evaluation, after it."""

    def masters_written(self) -> None:
        """Mark the weights as outdated: a restore has written to every `tensor`, on every rank."""
