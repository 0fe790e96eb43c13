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

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from ...kernels.rows import sum_rows
from ...models.llama import Llama
from ..config import ParallelConfig
from ..mesh import Mesh
from ..shards import local
from .fsdp_gather import Gather, give_memory, takes_memory
from .masters import weight_groups
from .transport import Transport

_SENT, _RECEIVED = 0, 1


class _Scatter:
    """FSDP2's reduce-scatter of gradients in the dtype that they were computed in: each rank is sent its own rows, and adds up.

    The sums are exact where the ring's are, at half the bytes of bf16 widened before it is sent. FSDP2 would round them.
    It sends one group's at a time: before it asks for the next one's memory it waits for the last.
    """

    def __init__(self, transport: Transport, exact: torch.dtype) -> None:
        """exact: the dtype of the sums. An instance serves one group of weights."""
        self._transport, self._exact = transport, exact
        self._sums: int | None = None

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """FSDP2 asks for what is sent, and then for what its sums go to: this rank's part of it.

        Told apart by their sizes: a pass that failed in between asks for what is sent twice.
        """
        count, expected = torch.Size(size).numel(), self._sums
        if count == expected:
            self._sums = None
            return torch.empty(size, dtype=self._exact, device=device)
        self._sums = count // self._transport.group.size()
        return self._transport.buffer(_SENT, size, dtype, device)

    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> None:
        assert op == dist.ReduceOp.SUM and not async_op and output_tensor.dtype == self._exact
        received = self._transport.buffer(_RECEIVED, input_tensor.shape, input_tensor.dtype, input_tensor.device)
        dist.all_to_all_single(received, input_tensor, group=self._transport.group)
        sum_rows(received.view(group.size(), -1), self._exact, out=output_tensor)


class ZeroGroups:
    """The groups of weights of this rank's stages, sharded over the mesh's `weights` and copied over its `copies`."""

    def __init__(self, mesh: Mesh, parallel: ParallelConfig, compute: torch.dtype, transport: Transport) -> None:
        """compute: what weights are gathered in; fp32 and fp64 are gathered as they are."""
        self._stage = mesh.layout.zero
        self._pipelined = parallel.pp > 1
        self._groups: list[FSDPModule] = []
        pinned = mesh.device.type == "cuda"
        # Stages 2 and 3 reduce every micro-batch; the others add those up before, which must not be done in bf16.
        exchanges = compute == torch.bfloat16 and self._stage >= 2 and not self._pipelined
        self._scatters = transport.twin(mesh) if exchanges and transport.by_copy_engines else None
        self._transports = [transport] if self._scatters is None else [transport, self._scatters]
        self._settings: dict[str, Any] = {
            "mesh": mesh.weights,
            "offload_policy": CPUOffloadPolicy(pin_memory=pinned) if parallel.offload == "cpu" else OffloadPolicy(),
        }
        # FSDP2 casts in a pass of its own; where it can be had, the copy that it makes afterwards casts (`fsdp_gather.py`).
        narrow = compute == torch.bfloat16
        self._cast_to = compute if narrow and takes_memory(compute, self._settings) else None
        sent = None if not narrow else compute if self._scatters is not None else torch.float32
        self._settings["mp_policy"] = MixedPrecisionPolicy(
            param_dtype=compute if narrow and self._cast_to is None else None, reduce_dtype=sent, cast_forward_inputs=False
        )
        custom = transport.by_copy_engines or self._cast_to is not None
        self._gather = Gather(transport, self._cast_to) if custom else None

    def shard(self, stage: Llama) -> None:
        """Cut a stage's weights, on the meta device, over the ranks."""
        # A pipeline gathers weights once per step. Its backward passes would keep them gathered anyway, and resharding
        # between the two halves of a zero-bubble backward pass gives wrong gradients without a word.
        reshard = self._stage == 3 and not self._pipelined
        ways = self._settings["mesh"].size(-1)
        for size in _padded(stage, ways):
            for transport in self._transports:
                transport.expect(size)
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
            if self._cast_to is not None:
                give_memory(group, ways, self._cast_to)
            if self._gather is not None:
                group.set_custom_all_gather(cast(Any, self._gather))
            if self._scatters is not None:
                group.set_custom_reduce_scatter(cast(Any, _Scatter(self._scatters, torch.float32)))

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


def _padded(stage: Llama, ways: int) -> Iterator[int]:
    """Elements of each group of weights, before they are cut over so many ranks: of as many rows on each."""
    for _, weights in weight_groups(stage):
        yield sum(-(-len(local(weight)) // ways) * ways * local(weight)[0].numel() for weight in weights)
