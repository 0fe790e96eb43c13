"""A DeepSpeed engine's fp32 masters, optimizer state and gradients, by parameter name (rule R6).

DeepSpeed's optimizers hold *groups*: flat fp32 tensors, each with its share of several parameters laid end to end.

    stage  a group is                                          this rank's share of a parameter of n elements
    0      one parameter                                       all of it; every rank holds the same
    1, 2   a parameter group, cut into W equal slices           what of it falls into the rank's slice
    3      (part of) a parameter group, each parameter cut      elements [r·c, r·c + c) with c = ⌈n / W⌉, the tail padded
           into W shards

A share is a flat range of the parameter, so it is a few boxes (`fragment.boxes_of_flat_range`). DeepSpeed's own functions
by name do not suffice: some hang with two parameter groups, some refuse sizes that W doesn't divide, and none updates the
low-precision weights. This follows DeepSpeed 0.19.8, the version that the extra pins. The test of write-back across stages
guards an upgrade.
"""

from __future__ import annotations

import itertools
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from ...optim.optimizers.parameters import initial_counter_values
from ..fragment import Fragment, boxes_of_flat_range

foreach: Any = torch  # the _foreach functions have no types


@dataclass(frozen=True)
class FlatShare:
    """Elements `[start, start + length)` of a parameter, at `offset` of the flat group numbered `group`."""

    name: str
    shape: tuple[int, ...]
    start: int
    length: int
    group: int
    offset: int


class EngineState(ABC):
    """Access by name to a DeepSpeed engine's state on this rank. One subclass per way of partitioning."""

    replicated = False  # whether every rank holds the same elements

    def __init__(self, engine: Any, base: torch.optim.Optimizer) -> None:
        self._engine = engine
        self.base = base  # the optimizer that updates the flat groups
        self._names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
        self.shares = [share for share in self._find_shares() if share.length > 0]

    @abstractmethod
    def masters(self) -> list[torch.Tensor]:
        """Return the flat fp32 groups. One on NVMe is an empty tensor until it is swapped in."""

    @abstractmethod
    def gradients(self) -> list[torch.Tensor]:
        """Return the reduced gradient after the last micro-batch, in pieces that together cover this rank's shares."""

    @abstractmethod
    def sync_from_masters(self) -> None:
        """Update the compute weights from the masters. Collective."""

    @abstractmethod
    def discard_gradients(self) -> None:
        """Discard the gradient without an update."""

    @abstractmethod
    def _find_shares(self) -> Iterator[FlatShare]:
        """Yield this rank's share of every parameter; some may be empty."""

    def gradient_squares(self) -> torch.Tensor:
        """Sum the squares of this rank's gradient, in fp64."""
        norms = foreach._foreach_norm(self.gradients())
        return torch.stack(norms).double().square().sum()

    def clip_gradients(self, max_norm: float, norm: torch.Tensor) -> None:
        """Scale by min(1, max_norm / (norm + 1e-6))."""
        gradients = self.gradients()
        foreach._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0).to(gradients[0]))

    def arrays(self, group: int) -> dict[str, torch.Tensor]:
        """Return role → flat tensor of a group: the master, and the optimizer's state that has its shape."""
        master = self.masters()[group]
        arrays = {"weight": master.detach()}
        for role, value in self.base.state.get(master, {}).items():
            if torch.is_tensor(value) and value.dim() and value.shape == master.shape:
                arrays[role] = value.detach()
        return arrays

    def fragments(self) -> Iterator[Fragment]:
        """Yield live boxes of every share."""
        for group, shares in itertools.groupby(sorted(self.shares, key=lambda share: share.group), lambda share: share.group):
            arrays = self.arrays(group)
            for share in shares:
                yield from _boxes(share, arrays)

    def counters(self) -> dict[str, float]:
        """Return the optimizer's scalars by name, the same for every group; {} before its first update."""
        state = self.base.state.get(self.masters()[0], {})
        return {role: float(value) for role, value in state.items() if not torch.is_tensor(value) or not value.dim()}

    def load_counters(self, counters: dict[str, float]) -> None:
        """Set the scalars of every group."""
        for master in self.masters():
            state = self.base.state[master]
            for role, value in counters.items():
                if torch.is_tensor(state[role]):
                    state[role].fill_(value)
                else:
                    state[role] = type(state[role])(value)

    def create_optimizer_state(self) -> None:
        """Make the optimizer create its state, by an update with a zero gradient at rate zero: no weight changes."""
        groups = self.base.param_groups
        rates = [group["lr"] for group in groups]
        members = [group["params"] for group in groups]
        for group in groups:
            group["lr"] = 0.0
        for index, master in enumerate(self.masters()):
            self._with_group(index, master, self._step_on_zero)
        for group, rate, member in zip(groups, rates, members, strict=True):
            group["lr"], group["params"] = rate, member
        self.load_counters(initial_counter_values(self.base, self.counters()))

    def _with_group(self, index: int, master: torch.Tensor, act: Any) -> None:
        act(index, master)

    def _step_on_zero(self, index: int, master: torch.Tensor) -> None:
        kept = master.grad
        master.grad = torch.zeros_like(master)
        for number, group in enumerate(self.base.param_groups):
            group["params"] = [master] if number == self._group_number(index) else []
        self.base.step()
        master.grad = kept

    def _group_number(self, index: int) -> int:
        """Return the index of the optimizer's parameter group that a flat group belongs to."""
        return index

    def updated(self) -> None:  # noqa: B027 - most have nothing to reset
        """Reset what was set for one step alone. Called after DeepSpeed's step."""


def whole_shape(parameter: torch.nn.Parameter) -> tuple[int, ...]:
    """Return the shape of the whole parameter, which stage 3 keeps beside an emptied tensor."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _boxes(share: FlatShare, arrays: dict[str, torch.Tensor]) -> Iterator[Fragment]:
    boxes = boxes_of_flat_range(share.shape, share.start, share.length)
    for role, flat in arrays.items():
        for box, at in boxes:
            tensor = flat.view(-1).narrow(0, share.offset + at, box.numel).view(box.shape)
            yield Fragment(share.name, role, share.shape, box, tensor)


class WholeState(EngineState):
    """Stage 0 in fp32: the model's own parameters are the masters, the same on every rank."""

    replicated = True

    def masters(self) -> list[torch.Tensor]:
        """Return the parameters."""
        return list(self._engine.module.parameters())

    def gradients(self) -> list[torch.Tensor]:
        """Return their gradients, averaged over ranks."""
        return [parameter.grad for parameter in self._engine.module.parameters() if parameter.grad is not None]

    def sync_from_masters(self) -> None:
        """Do nothing: the masters are the compute weights."""

    def discard_gradients(self) -> None:
        """Discard them."""
        self.base.zero_grad()

    def create_optimizer_state(self) -> None:
        """Update once with a zero gradient at rate zero, through the optimizer's own groups."""
        for group in self.base.param_groups:
            group["lr"] = 0.0
        for parameter in self.masters():
            parameter.grad = torch.zeros_like(parameter)
        self.base.step()
        self.base.zero_grad()
        self.load_counters(initial_counter_values(self.base, self.counters()))

    def _find_shares(self) -> Iterator[FlatShare]:
        for index, (name, parameter) in enumerate(self._engine.module.named_parameters()):
            yield FlatShare(name, tuple(parameter.shape), 0, parameter.numel(), index, 0)


class SlicedState(EngineState):
    """Stages 1 and 2: parameter groups flattened, each cut into equal slices."""

    def __init__(self, engine: Any, base: torch.optim.Optimizer) -> None:
        self._optimizer = engine.optimizer
        # Stage 1 in bf16 with fp32 accumulation is a class of its own, BF16_Optimizer, with other names.
        self._is_bf16_class = hasattr(engine.optimizer, "bf16_groups")
        super().__init__(engine, base)

    def masters(self) -> list[torch.Tensor]:
        """Return this rank's slice of every parameter group."""
        wrapper = self._optimizer
        return wrapper.fp32_groups_flat_partition if self._is_bf16_class else wrapper.single_partition_of_fp32_groups

    def gradients(self) -> list[torch.Tensor]:
        """Return the slices' gradients: flat in BF16_Optimizer and when offloaded, otherwise a list of tensors per group."""
        wrapper = self._optimizer
        if self._is_bf16_class:
            return list(wrapper.fp32_groups_gradient_flat_partition)
        if wrapper.cpu_offload:
            return [master.grad for master in self.masters() if master.grad is not None]
        found: list[torch.Tensor] = []
        for tensors in wrapper.averaged_gradients.values():
            found += tensors or []
        return found

    def sync_from_masters(self) -> None:
        """Cast this rank's slices into the model's flat weights and gather the other ranks'."""
        self._optimizer.update_lp_params()

    def discard_gradients(self) -> None:
        """Discard it as DeepSpeed's step does when it rejects a gradient."""
        wrapper = self._optimizer
        wrapper.zero_grad()
        if self._is_bf16_class:
            return
        wrapper.micro_step_id = -1
        wrapper._release_preflattened_grad_buffers()
        for index in wrapper.averaged_gradients:
            wrapper.averaged_gradients[index] = wrapper.all_grad_tensors[index] = None
        if wrapper.cpu_offload:
            wrapper.reset_cpu_buffers()
            wrapper._offload_accumulated_param_ids = set()

    def _find_shares(self) -> Iterator[FlatShare]:
        wrapper = self._optimizer
        for index, master in enumerate(self.masters()):
            if self._is_bf16_class:
                members = wrapper.bf16_groups[index]
                offsets = [sum(p.numel() for p in members[:i]) for i in range(len(members))]
            else:
                members, offsets = wrapper.round_robin_bit16_groups[index], wrapper.round_robin_bit16_offsets[index]
            first = dist.get_rank(wrapper.real_dp_process_group[index]) * master.numel()
            for parameter, at in zip(members, offsets, strict=True):
                begin, end = max(at, first), min(at + parameter.numel(), first + master.numel())
                yield FlatShare(
                    self._names[id(parameter)], tuple(parameter.shape), begin - at, end - begin, index, begin - first
                )


class ShardedState(EngineState):
    """Stage 3: every parameter cut into one shard per rank. Groups may be swapped out to NVMe.

    A swapped group's arrays are its files, memory-mapped: reading and writing them takes only reclaimable memory, however
    large the state is. DeepSpeed reads and writes the same files past the page cache, which the kernel keeps coherent
    (`sync_from_masters` writes dirty pages first).
    """

    def __init__(self, engine: Any, base: torch.optim.Optimizer) -> None:
        self._optimizer = engine.optimizer
        super().__init__(engine, base)

    def masters(self) -> list[torch.Tensor]:
        """Return the shards of (part of) every parameter group, laid end to end."""
        return self._optimizer.fp32_partitioned_groups_flat

    def gradients(self) -> list[torch.Tensor]:
        """Return the gradient's shards; those on NVMe can't be read."""
        if self._optimizer.offload_optimizer:
            return [master.grad for master in self.masters() if master.grad is not None]
        found: list[torch.Tensor] = []
        for tensors in self._optimizer.averaged_gradients.values():
            found += tensors or []
        return found

    def gradient_squares(self) -> torch.Tensor:
        """Sum from the gradient; on NVMe from the norms that DeepSpeed took of each shard before it swapped it out."""
        if not self._optimizer.swap_optimizer:
            return super().gradient_squares()
        norms = [torch.as_tensor(norm, dtype=torch.float64).cpu() for norm in self._optimizer.norm_for_param_grads.values()]
        return torch.stack(norms).square().sum() if norms else torch.zeros((), dtype=torch.float64)

    def clip_gradients(self, max_norm: float, norm: torch.Tensor) -> None:
        """Scale; on NVMe DeepSpeed does it by the same formula in its step."""
        if self._optimizer.swap_optimizer:
            self._optimizer.clip_grad = max_norm
        else:
            super().clip_gradients(max_norm, norm)

    def arrays(self, group: int) -> dict[str, torch.Tensor]:
        """Return role → flat tensor of a group: in memory, or a mapping of the file on NVMe."""
        if not self._swapped(group):
            return super().arrays(group)
        count, dtype = self._swap_info(group).numel(), self.masters()[group].dtype
        return {role: torch.from_file(path, shared=True, size=count, dtype=dtype) for role, path in self._files(group)}

    def sync_from_masters(self) -> None:
        """Cast the masters into the model's shards, and gather again the weights that stay gathered."""
        wrapper = self._optimizer
        for index in range(len(self.masters())):
            swapped = self._swapped(index)
            if swapped:
                for _, path in self._files(index):
                    _write_out(path)
                self._swap_in(index)
            wrapper._reassign_or_swap_out_partitioned_parameters(index)
            if swapped:
                wrapper._release_swap_buffers(index)
        if wrapper.persistent_parameters:
            wrapper.persistent_parameters[0].partition(wrapper.persistent_parameters)
            wrapper.persistent_parameters[0].all_gather(wrapper.persistent_parameters)
        wrapper.invalidate_secondary_tensor()

    def discard_gradients(self) -> None:
        """Discard it as DeepSpeed's step does when it rejects a gradient, but keep the weights in step with the masters."""
        wrapper = self._optimizer
        wrapper._pre_step()
        wrapper.zero_grad()
        if wrapper.offload_optimizer:
            wrapper.reset_cpu_buffers()
        else:
            wrapper.averaged_gradients = {}

    def updated(self) -> None:
        """Reset the clipping of the last gradient."""
        self._optimizer.clip_grad = 0.0

    def _swapped(self, index: int) -> bool:
        return self._optimizer._swappable_optimizer_subgroup(index)

    def _swap_in(self, index: int) -> None:
        self._optimizer._optimizer_states_and_gradient_swap_in(index)

    def _swap_info(self, index: int) -> Any:
        """Return DeepSpeed's record of a swapped group, after all its pending writes."""
        swapper = self._optimizer.optimizer_swapper
        if getattr(swapper, "swap_ops", {}).get("async_swap_out"):  # offload_optimizer.pipeline_write leaves one under way
            swapper._complete_swap_out("async_swap_out")
        return swapper._get_param_swap_info(self.masters()[index])

    def _files(self, index: int) -> list[tuple[str, str]]:
        """List role and file of each of a swapped group's arrays. DeepSpeed names state tensors by role and master."""
        master, *states = self._swap_info(index).tensors
        ending = f"-{master.compute_tensor.ds_id}"
        named = [(state.compute_tensor.ds_id.removesuffix(ending), state.swap_path) for state in states]
        return [("weight", master.swap_path), *named]

    def _with_group(self, index: int, master: torch.Tensor, act: Any) -> None:
        if self._swapped(index):
            self._swap_in(index)
            act(index, master)
            self._optimizer._optimizer_states_and_gradient_swap_out(index)
        else:
            act(index, master)

    def _group_number(self, index: int) -> int:
        return self._optimizer.sub_group_to_group_id[index]

    def _find_shares(self) -> Iterator[FlatShare]:
        wrapper = self._optimizer
        for name, parameter in self._engine.module.named_parameters():
            shape = tuple(parameter.ds_shape)
            shard, whole = parameter.partition_numel(), parameter.ds_numel
            start = min(wrapper._get_param_partition_rank(parameter) * shard, whole)
            group, offset, _ = wrapper.grad_position[wrapper.get_param_id(parameter)]
            yield FlatShare(name, shape, start, min(shard, whole - start), group, offset)


def _write_out(path: str) -> None:
    """Flush what was written through a mapping of this file to the disk, where DeepSpeed reads it."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def state_of(engine: Any, base: torch.optim.Optimizer, stage: int) -> EngineState:
    """Make the state by name of an initialized DeepSpeed engine of this ZeRO stage over this optimizer."""
    return {0: WholeState, 1: SlicedState, 2: SlicedState, 3: ShardedState}[stage](engine, base)
