"""A DeepSpeed engine's state by parameter name, for each way in which a ZeRO stage partitions it. See `state.py`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from ...optim.optimizers.parameters import initial_counter_values
from .state import EngineState, FlatShare


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
