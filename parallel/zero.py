"""ZeRO's stages by one mechanism, FSDP2, told when to communicate.

Counts per step with M micro-batches, per group of weights (a block, the embedding, what is left):

    stage  weights gathered        gradient reduced      mesh of a weight
    0      never (M local copies)  all-reduced once      (copies, 1)      in pipelines; elsewhere by `masters.py`
    1      once                    once                  (shards)         in pipelines; elsewhere by `masters.py`
    2      once                    M times               (shards)
    3      2 M times               M times               (shards)

Gradients are *summed* over ranks, because each micro-batch's loss is already divided by the tokens of the whole global
batch (rule R2): no factor depends on how the batch was cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from ..config.parallel import ParallelConfig
from ..models.llama import Llama
from .mesh import Mesh
from .transport import Transport, gather_rows


class _Gather:
    """FSDP2's all-gather as a transport does it, in its own group of the same ranks."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """What a group's weights are gathered in."""
        with self._transport.memory():
            return torch.empty(size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> Any:
        return gather_rows(output_tensor, input_tensor, group=self._transport.group, async_op=async_op)


class ZeroGroups:
    """The groups of weights of this rank's stages, sharded over the mesh's `weights` and copied over its `copies`."""

    def __init__(self, mesh: Mesh, parallel: ParallelConfig, compute: torch.dtype, transport: Transport) -> None:
        """compute: what weights are gathered in; fp32 and fp64 are gathered as they are."""
        self._stage = mesh.layout.zero
        self._pipelined = parallel.pp > 1
        self._transport = transport
        self._groups: list[FSDPModule] = []
        pinned = mesh.device.type == "cuda"
        if compute == torch.bfloat16:
            policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False)
        else:
            policy = MixedPrecisionPolicy(cast_forward_inputs=False)
        self._settings: dict[str, Any] = {
            "mesh": mesh.weights,
            "mp_policy": policy,
            "offload_policy": CPUOffloadPolicy(pin_memory=pinned) if parallel.offload == "cpu" else OffloadPolicy(),
        }

    def shard(self, stage: Llama) -> None:
        """Cut a stage's weights, on the meta device, over the ranks."""
        # A pipeline gathers weights once per step. Its backward passes would keep them gathered anyway, and resharding
        # between the two halves of a zero-bubble backward pass gives wrong gradients without a word.
        reshard = self._stage == 3 and not self._pipelined
        for block in stage.layers.values():
            fully_shard(block, reshard_after_forward=reshard, **self._settings)
        if stage.embed is not None and not stage.tied:
            fully_shard(stage.embed, reshard_after_forward=reshard, **self._settings)
        # What is left (norm, head, a tied embedding) is gathered at the root, where the loss reads the head's weight.
        fully_shard(stage, reshard_after_forward=False, **self._settings)
        groups = [module for module in stage.modules() if isinstance(module, FSDPModule)]
        self._groups += groups
        for group in groups:
            group.set_gradient_divide_factor(1.0)
            group.set_force_sum_reduction_for_comms(True)
            if self._transport.by_copy_engines:
                group.set_custom_all_gather(cast(Any, _Gather(self._transport)))

    def expect(self, root: nn.Module, last: bool) -> None:
        """Before a micro-batch's forward pass: which collectives it needs. last: gradients must be complete after it."""
        module = cast(FSDPModule, root)
        if self._stage < 3:
            module.set_reshard_after_backward(last)
        if self._stage < 2:
            module.set_requires_gradient_sync(last)
        else:
            module.set_requires_all_reduce(last)

    def reshard(self) -> None:
        """Free gathered weights after passes without a backward pass: the next step would use them, stale."""
        for group in self._groups:
            group.reshard()
