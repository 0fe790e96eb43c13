"""Communication of masters: reduce-scatter of a unit's gradients to their masters, and all-gather of the updated rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from ...kernels.rows import sum_rows
from ..mesh import WeightAxes
from ..shards import Placements, local, own_part
from .transport import Transport, gather_rows


@dataclass
class MasterWeight:
    """One weight, and the master of this rank's part of it.

    placed       mesh and placements of a tensor-parallel weight. Not the parameter itself: its hook refers to this, and
                 such a cycle is never collected
    whole        its data on this rank, used in the computation
    rows         of each rank's part of `whole`; the last ranks may have fewer
    local_shard  this rank's part
    """

    placed: tuple[DeviceMesh, Placements] | None
    whole: torch.Tensor
    rows: int
    local_shard: torch.Tensor
    master: nn.Parameter

    @property
    def padded_numel(self) -> int:
        """Elements of a part, padded to the size of the largest."""
        return self.rows * self.whole[0].numel()

    def pending(self, gradient: torch.Tensor) -> Placements | None:
        """Return the placements of a gradient still to be summed over tensor-parallel ranks that all hold the whole weight."""
        if not isinstance(gradient, DTensor) or self.placed is None:
            return None
        pairs = list(zip(gradient.placements, self.placed[1], strict=True))
        sums = any(here.is_partial() for here, _ in pairs)
        as_large = all(here == there or (here.is_partial() and there.is_replicate()) for here, there in pairs)
        return gradient.placements if sums and as_large else None

    def part(self, gradient: torch.Tensor) -> torch.Tensor:
        """Return this rank's part of a gradient. A collective if it must be summed first."""
        return own_part(gradient, None if self.placed is None else self.placed[1])

    def sum_over_tp(self, parts: torch.Tensor, placements: Placements) -> torch.Tensor:
        """Sum a gradient of such placements over tensor-parallel ranks. A collective."""
        assert self.placed is not None
        return self.part(DTensor.from_local(parts, self.placed[0], placements, run_check=False))

    def add_to_grad(self, gradient: torch.Tensor | None) -> None:
        """Add to the master's gradient. None: the weight was not used."""
        if gradient is not None and self.master.grad is not None:
            self.master.grad += gradient
        elif gradient is not None:
            self.master.grad = gradient


@dataclass(eq=False)
class ExchangeUnit:
    """Weights whose gradients are sent together, and which are gathered before the same modules are called.

    groups     those in which gradients are exchanged, one after another
    taken      gradients so far, of the micro-batches since the last exchange
    pending    index of a weight → placements of its gradient that must still be summed over tensor-parallel ranks
    missing    number of gradients that the last micro-batch has not produced yet
    used       which weights have a gradient in the exchange under way
    reducing   the tensor being received, its collective, and the next action on it
    gathering  collectives under way that make weights whole, each with (weight, its padded copy) of those that are not
               cut evenly
    """

    weights: list[MasterWeight]
    axes: WeightAxes
    transport: Transport
    groups: Sequence[dist.ProcessGroup]
    taken: list[torch.Tensor | None] = field(init=False)
    pending: dict[int, Placements] = field(init=False)
    missing: int = field(init=False)
    used: list[bool] = field(default_factory=list)
    reducing: tuple[torch.Tensor, Any, Callable[[torch.Tensor], None]] | None = None
    gathering: list[tuple[Any, Sequence[tuple[torch.Tensor, torch.Tensor]]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.clear()

    @property
    def padded_numel(self) -> int:
        """Elements of a rank's parts, each padded to the size of the largest."""
        return sum(weight.padded_numel for weight in self.weights)

    def clear(self) -> None:
        """Discard the gradients so far."""
        self.taken, self.pending = [None] * len(self.weights), {}
        self.missing, self.reducing = len(self.weights), None

    def abandon(self) -> None:
        """Wait for the exchange that a failed pass left pending, and discard it: its memory will be used again."""
        if self.reducing is not None:
            self.reducing[1].wait()
        self.clear()

    def take(self, index: int, gradient: torch.Tensor, keep_dtype: bool) -> None:
        """Add one micro-batch's gradient of a weight. keep_dtype: a single one may keep its dtype."""
        weight, before = self.weights[index], self.taken[index]
        placements = weight.pending(gradient)
        if before is not None and placements != self.pending.get(index):  # a micro-batch of a size that can't be cut
            self._sum_pending(index)
            before, placements = self.taken[index], None
        if placements is None:
            gradient = weight.part(gradient)
        else:
            gradient, self.pending[index] = local(gradient), placements
        if before is not None:
            before += gradient
        else:
            self.taken[index] = gradient if keep_dtype else gradient.to(weight.master.dtype)

    def take_zeros(self, index: int, keep_dtype: bool) -> None:
        """Count a weight without a gradient here as used. keep_dtype: as of `take`."""
        weight = self.weights[index]
        self.taken[index] = torch.zeros_like(weight.whole, dtype=None if keep_dtype else weight.master.dtype)

    def _sum_pending(self, index: int) -> None:
        parts, placements = self.taken[index], self.pending.pop(index, None)
        if parts is not None and placements is not None:
            self.taken[index] = self.weights[index].sum_over_tp(parts, placements)

    def reduce(self) -> None:
        """Start to send every rank its rows of the gradients, which are complete here; zeros for a weight without one."""
        for index in sorted(self.pending):
            self._sum_pending(index)
        num_shards = self.axes.num_shards
        # Private: `_chunk_cat` (FSDP2's own) pads, cuts and joins all gradients in one kernel. `test_masters.py` compares sums.
        taken, like = self.taken, next(gradient for gradient in self.taken if gradient is not None)
        self.clear()
        if not self.axes.shared:
            for weight, gradient in zip(self.weights, taken, strict=True):
                weight.add_to_grad(gradient)
            return
        self.used = [gradient is not None for gradient in taken]
        gradients = [
            like.new_zeros(weight.whole.shape) if gradient is None else gradient.contiguous()
            for weight, gradient in zip(self.weights, taken, strict=True)
        ]
        if num_shards == 1:
            self._reduce_copies(torch._chunk_cat(gradients, 0, num_shards)[0].to(self.weights[0].master.dtype))
            return
        if len(self.groups) == 1:
            parts, received = self.transport.exchange_buffers((num_shards, self.padded_numel), like)
            torch._chunk_cat(gradients, 0, num_shards, out=parts)
        else:
            parts = _sorted_for(self.groups[0], torch._chunk_cat(gradients, 0, num_shards))
            received = torch.empty_like(parts)
        self._exchange(parts, received, self.groups)

    def _exchange(self, parts: torch.Tensor, received: torch.Tensor, groups: Sequence[dist.ProcessGroup]) -> None:
        """Start to send each rank of the first group the rows for it and for the ranks to which it passes their sums on.

        parts, received: (ranks of the group, their rows)
        """
        group, *others = groups

        def add_up(arrived: torch.Tensor) -> None:
            total = sum_rows(arrived.view(group.size(), -1), self.weights[0].master.dtype)
            if others:
                rows = _sorted_for(others[0], total.view(-1, self.padded_numel))
                self._exchange(rows, torch.empty_like(rows), others)
            else:
                self._reduce_copies(total)

        self.reducing = received, dist.all_to_all_single(received, parts, group=group, async_op=True), add_up

    def advance(self) -> bool:
        """Wait for the pending collective and start the next. Returns whether there is none left."""
        if self.reducing is not None:
            arriving, work, then = self.reducing
            self.reducing = None
            work.wait()
            then(arriving)
        return self.reducing is None

    def _reduce_copies(self, total: torch.Tensor) -> None:
        """Sum this rank's rows over the ranks that hold copies of them."""
        if self.axes.num_copies == 1:
            self._deliver(total)
        else:
            self.reducing = total, dist.all_reduce(total, group=self.axes.copies.get_group(), async_op=True), self._deliver

    def _deliver(self, total: torch.Tensor) -> None:
        at = 0
        for weight, used in zip(self.weights, self.used, strict=True):
            shard = weight.local_shard
            weight.add_to_grad(total[at : at + shard.numel()].view_as(shard) if used else None)
            at += weight.padded_numel

    def all_gather(self) -> None:
        """Start to all-gather all ranks' rows into the whole weights."""
        num_shards, rank, group = self.axes.num_shards, self.axes.shards.get_local_rank(), self.transport.group
        pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        uneven: list[tuple[torch.Tensor, torch.Tensor]] = []
        for weight in self.weights:
            whole, shard = weight.whole, weight.local_shard
            if len(whole) != num_shards * weight.rows:
                whole = whole.new_empty(num_shards * weight.rows, *whole.shape[1:])
                uneven.append((weight.whole, whole))
                shard = whole.narrow(0, rank * weight.rows, weight.rows)
                shard[: len(weight.local_shard)].copy_(weight.local_shard)
            pairs.append((whole, shard))
        if self.weights[0].whole.device.type == "cuda":
            # Private: one NCCL call for many tensors; tests/parallel/test_gpu_two.py runs it.
            with dist._coalescing_manager(group, async_ops=True) as batched:
                for whole, shard in pairs:
                    gather_rows(whole, shard, group=group)
            self.gathering = [(batched, uneven)]
        else:
            works = [gather_rows(whole, shard, group=group, async_op=True) for whole, shard in pairs]
            self.gathering = [*((work, ()) for work in works[:-1]), (works[-1], uneven)]

    def wait_all_gather(self, *, obsolete: bool = False) -> None:
        """Wait until the weights are whole again. obsolete: rows have changed since, and will be gathered again."""
        for work, uneven in self.gathering:
            work.wait()
            for whole, padded in () if obsolete else uneven:
                whole.copy_(padded[: len(whole)])
        self.gathering = []


def _sorted_for(group: dist.ProcessGroup, rows: torch.Tensor) -> torch.Tensor:
    """Sort rows (ranks, elements) by who of a group gets them: (ranks of the group, rows for others behind each, elements)."""
    return rows.unflatten(0, (-1, group.size())).transpose(0, 1).contiguous()


class GradientReducer:
    """Takes gradients from the backward pass, and starts to reduce each unit's as soon as they are complete.

    It refers to no parameter: its hooks are on them, and such a cycle is never collected.

    keep_grad_dtype  whether gradients stay in the dtype of the compute until they are summed
    last             whether the micro-batch under way completes the gradients
    """

    def __init__(self, waiting: Callable[[], AbstractContextManager[None]]) -> None:
        """waiting: encloses what waits for other ranks during the backward pass."""
        self._waiting = waiting
        self.keep_grad_dtype = self.last = False
        self._reducing: list[ExchangeUnit] = []

    def hook(self, unit: ExchangeUnit, index: int) -> Callable[[torch.Tensor], None]:
        """Make the hook that the weight of this index in its unit calls when its gradient is ready."""

        @torch.no_grad()
        def take(weight: torch.Tensor) -> None:
            gradient, weight.grad = weight.grad, None
            if gradient is not None:
                unit.take(index, gradient, self.keep_grad_dtype)
            elif unit.taken[index] is None:
                # An autograd function gave None, which its graph does not tell, so other ranks expect a gradient.
                unit.take_zeros(index, self.keep_grad_dtype)
            unit.missing -= self.last
            if not unit.missing:
                self.reduce(unit)

        return take

    def reduce(self, unit: ExchangeUnit) -> None:
        """Start to reduce a unit's gradients."""
        if self._reducing:
            with self._waiting():  # the last unit's arrived while these were computed, unless a rank is slow
                self._reducing = [before for before in self._reducing if not before.advance()]
        unit.reduce()
        self._reducing.append(unit)

    def wait(self) -> None:
        """Wait for all pending reductions."""
        while self._reducing:
            self._reducing = [unit for unit in self._reducing if not unit.advance()]

    def abandon(self) -> None:
        """Wait for what a failed pass left pending, and discard it."""
        for unit in self._reducing:
            unit.abandon()
        self._reducing = []
