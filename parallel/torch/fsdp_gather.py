"""Make FSDP2 gather weights in a transport's group and memory, after one pass over the shards.

By itself FSDP2 casts a group's shards to the compute dtype in its own memory, and copies the result into the gather buffer.
Here it does not get the dtype (no `param_dtype`). So it copies its shards as they are into our buffer, which has that dtype,
and the copy is the cast: the same numbers. FSDP2 then does not know the dtype of the whole weights, so their memory is
allocated for it in advance. That relies on private names of FSDP2, and on its rule to allocate only what is missing. Both are
tested on a small module first (`can_set_gather_dtype`); if either fails, FSDP2 casts in its own way.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from ...kernels.rows import pack
from .transport import Transport, gather_rows

log = logging.getLogger(__name__)


class Gather:
    """FSDP2's all-gather as a transport does it. One instance serves all groups of weights.

    Two buffers suffice for copy engines: FSDP2 frees a group's buffer, and has its streams wait for its readers, before it
    asks for the one after the next.
    """

    def __init__(self, transport: Transport, cast_to: torch.dtype | None) -> None:
        """cast_to: what FSDP2's shards are cast to when it copies them to be sent. None: they already have their dtype."""
        self._transport, self._cast_to = transport, cast_to
        self._turns = itertools.cycle((0, 1))

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Allocate the buffer in which a group's weights are gathered."""
        if self._cast_to is None:
            return self._transport.buffer(next(self._turns), size, dtype, device)
        return self._transport.buffer(next(self._turns), size, self._cast_to, device).as_subclass(_GatherBuffer)

    def __call__(
        self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> Any:
        """All-gather all ranks' parts; waits unless `async_op`."""
        if self._transport.by_copy_engines:  # in a group of its own, of the same ranks
            group = self._transport.group
        return gather_rows(output_tensor, input_tensor, group=group, async_op=async_op)


class _GatherBuffer(torch.Tensor):
    """A gather buffer into which FSDP2 copies its shards: `pack` does that in place of PyTorch's copy.

    PyTorch's is also correct, but casts at three quarters of the memory bandwidth.
    """

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func is not torch.ops.fsdp.all_gather_copy_in or len(args) != 5:
                return func(*args, **(kwargs or {}))
            shards, place, sizes, size, rank = args
            whole = place.as_subclass(torch.Tensor)
            sent = whole.narrow(0, size * rank, size)
            with torch.no_grad():
                pack(torch.split(sent, sizes), shards)
            return sent, whole


def fsdp_groups(module: FSDPModule) -> list[Any]:
    """Return FSDP2's records of what it gathers with a module. PyTorch 2.11 and 2.13 name them differently."""
    state: Any = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
    return [group for group in groups if group is not None]


def fsdp_parameters(module: FSDPModule) -> Iterator[Any]:
    """Yield FSDP2's records of the weights that it gathers with a module."""
    return (parameter for group in fsdp_groups(module) for parameter in group.fsdp_params)


def set_gather_dtype(module: FSDPModule, num_shards: int, dtype: torch.dtype) -> None:
    """Set the dtype of a module's gathered weights, before they are first gathered from this many ranks.

    Raises AttributeError, TypeError or RuntimeError where FSDP2 has changed.
    """
    for parameter in fsdp_parameters(module):
        size = parameter.padded_sharded_param_size.numel()
        parameter.init_all_gather_outputs([size], [dtype], num_shards, parameter.device)
        parameter.init_all_gather_outputs(
            [size], [parameter.sharded_param.dtype], num_shards, parameter.device
        )  # as FSDP2 will
        if [memory.dtype for memory in parameter.all_gather_outputs] != [dtype]:
            raise RuntimeError("FSDP2 does not keep the memory that it was given")
        parameter.free_unsharded_param()


def can_set_gather_dtype(dtype: torch.dtype, settings: Mapping[str, Any]) -> bool:
    """Return whether `set_gather_dtype` works. settings: of `fully_shard`; weights are cut over the last dim of `mesh`."""
    trial = fully_shard(nn.Linear(2, 3, bias=False, device="meta"), **settings)
    try:
        if len(list(fsdp_parameters(trial))) != 1:
            raise RuntimeError("FSDP2 keeps its records of weights elsewhere")
        set_gather_dtype(trial, settings["mesh"].size(-1), dtype)
    except (AttributeError, TypeError, RuntimeError) as error:
        log.debug("FSDP2 casts weights in a pass of its own before they are gathered: %s", error)
        return False
    return True
