"""Fully sharded weights: ZeRO's stages by FSDP2, which is told when to communicate.

Counts per step with M micro-batches, per unit of weights (a block, the embedding, what is left):

    stage  weights gathered        gradient reduced      mesh of a weight
    0      never (M local copies)  all-reduced once      (copies, 1)      in pipelines; elsewhere by `masters.py`
    1      once                    once                  (shards)         in pipelines; elsewhere by `masters.py`
    2      once                    M times               (shards)
    3      2 M times               M times               (shards)

Gradients are *summed* over ranks, because each micro-batch's loss is already divided by the tokens of the whole global
batch (rule R2): no factor depends on how the batch was cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from ...kernels.rows import sum_rows
from ...models.protocol import Model
from ..config import ParallelConfig
from ..mesh import Mesh
from ..shards import Placed, local, own_part, placements_of
from ..weight_use import SameWeights
from .fsdp_gather import Gather, can_set_gather_dtype, set_gather_dtype
from .fsdp_waiting import enclose_waiting
from .groups import ParameterGroup, gather_units, split_by_group
from .strategy import LocalWeight, WeightStrategy
from .transport import Transport

_SENT, _RECEIVED = 0, 1


class ReduceScatter:
    """FSDP2's reduce-scatter of gradients in the dtype that they were computed in: each rank is sent its own rows, and adds up.

    The sums are exact where the ring's are, at half the bytes of bf16 widened before it is sent. FSDP2 would round them.
    It sends one unit's at a time: before it asks for the next one's memory it waits for the last.
    """

    def __init__(self, transport: Transport, accum_dtype: torch.dtype) -> None:
        """accum_dtype: of the sums. An instance serves one unit of weights."""
        self._transport, self._accum_dtype = transport, accum_dtype
        self._sums: int | None = None

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Allocate for FSDP2: first what is sent, then the output of the sums, which is this rank's part of it.

        The size tells which: after a pass that failed in between, FSDP2 asks for what is sent twice.
        """
        count, expected = torch.Size(size).numel(), self._sums
        if count == expected:
            self._sums = None
            return torch.empty(size, dtype=self._accum_dtype, device=device)
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
        """Exchange rows and sum them."""
        assert op == dist.ReduceOp.SUM and not async_op and output_tensor.dtype == self._accum_dtype
        received = self._transport.buffer(_RECEIVED, input_tensor.shape, input_tensor.dtype, input_tensor.device)
        dist.all_to_all_single(received, input_tensor, group=self._transport.group)
        sum_rows(received.view(group.size(), -1), self._accum_dtype, out=output_tensor)


class FullyShardedWeights(WeightStrategy):
    """See the module's docstring."""

    def __init__(
        self,
        group: ParameterGroup,
        groups: Sequence[ParameterGroup],
        mesh: Mesh,
        transport: Transport,
        parallel: ParallelConfig,
        *,
        compute: torch.dtype,
        may_skip: bool,
    ) -> None:
        """groups: all of the model's; compute: what weights are gathered in; fp32 and fp64 are gathered as they are.

        may_skip: whether ranks may use different weights, which is refused where it is seen
        """
        super().__init__()
        self._group, self._groups = group, groups
        self._zero = mesh.layout.zero
        self._pipelined = parallel.pp > 1
        self._stages: list[Model] = []
        self._units: list[FSDPModule] = []
        axes = mesh.weight_axes[group.name]
        self._mesh, self._axes = mesh, axes
        # Only where every micro-batch communicates do all ranks run as many.
        self._may_skip = may_skip and axes.shared and self._zero >= 2 and not self._pipelined
        self._same: SameWeights | None = None
        # Where shards, gradients and optimizer state live: with CPU offload, FSDP2 copies to and from it.
        self._home = torch.device("cpu") if parallel.offload == "cpu" else mesh.device
        pinned = mesh.device.type == "cuda"
        # Stages 2 and 3 reduce every micro-batch. The others accumulate before, which must not be done in bf16.
        exchanges = compute == torch.bfloat16 and self._zero >= 2 and not self._pipelined
        self._scatters = transport.twin(mesh, axes) if exchanges and transport.by_copy_engines else None
        self._transports = [transport] if self._scatters is None else [transport, self._scatters]
        self._settings: dict[str, Any] = {
            "mesh": axes.both,
            "offload_policy": CPUOffloadPolicy(pin_memory=pinned) if parallel.offload == "cpu" else OffloadPolicy(),
        }
        # FSDP2 casts in a pass of its own; where possible, the copy that it makes afterwards casts (`fsdp_gather.py`).
        half = compute == torch.bfloat16
        self._cast_to = compute if half and can_set_gather_dtype(compute, self._settings) else None
        sent = None if not half else compute if self._scatters is not None else torch.float32
        self._settings["mp_policy"] = MixedPrecisionPolicy(
            param_dtype=compute if half and self._cast_to is None else None, reduce_dtype=sent, cast_forward_inputs=False
        )
        custom = transport.by_copy_engines or self._cast_to is not None
        self._gather = Gather(transport, self._cast_to) if custom else None

    def shard(self, stage: Model) -> None:
        """Have FSDP2 shard the units, and allocate the shards."""
        # A pipeline gathers weights once per step. Its backward passes would keep them gathered anyway, and resharding
        # between the two halves of a zero-bubble backward pass silently gives wrong gradients.
        self._stages.append(stage)
        reshard = self._zero == 3 and not self._pipelined
        _, others = split_by_group(stage, self._group, self._groups)
        ignored = set(others.values())
        units = list(gather_units(stage, self._group, self._groups))
        for unit in units:
            num_shards = self._axes.num_shards
            rows = [(local(weight), -(-len(local(weight)) // num_shards)) for weight in unit.weights]
            padded_numel = num_shards * sum(count * weight[0].numel() for weight, count in rows)
            for transport in self._transports:
                transport.reserve(padded_numel)
        for unit in units:
            # What is left (norm, head, a tied embedding) is gathered at the root, where the loss reads the head's weight.
            module = unit.module
            fully_shard(module, reshard_after_forward=reshard and module is not stage, ignored_params=ignored, **self._settings)
            self._tell(cast(FSDPModule, module))

        own = {id(weight) for weight in split_by_group(stage, self._group, self._groups)[0].values()}

        def give(tensor: torch.Tensor) -> torch.Tensor:
            if isinstance(tensor, nn.Parameter):  # those of other groups are not theirs alone yet
                return torch.empty_like(tensor, device=self._home) if id(tensor) in own else tensor
            return torch.empty_like(tensor, device=self._mesh.device) if tensor.is_meta else tensor.to(self._mesh.device)

        stage._apply(give)

    def _tell(self, unit: FSDPModule) -> None:
        """Tell FSDP2 how this unit communicates."""
        self._units.append(unit)
        enclose_waiting(unit, self._mesh)
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
        if self._cast_to is not None:
            set_gather_dtype(unit, self._axes.num_shards, self._cast_to)
        if self._gather is not None:
            unit.set_custom_all_gather(cast(Any, self._gather))
        if self._scatters is not None:
            unit.set_custom_reduce_scatter(cast(Any, ReduceScatter(self._scatters, torch.float32)))

    def adopt(self, stages: Sequence[Model], named: Mapping[str, nn.Parameter]) -> None:
        """List the shards as plain tensors that share their storage, to avoid DTensor's dispatch cost."""
        for stage in stages:
            for name in split_by_group(stage, self._group, self._groups)[0]:
                if name in named:
                    placed = Placed.of(named[name], self._mesh, self._axes.outer)
                    self.local[name] = LocalWeight(placed, nn.Parameter(local(named[name])))
        if self._may_skip:
            groups = [axis.get_group() for axis in (self._axes.shards, self._axes.copies) if axis.size() > 1]
            units = [[name for _, _, name in owners] for _, owners in self._owned()]
            self._same = SameWeights(units, groups, self._mesh.compute_time.waiting)
            self.watch(self._same.see)

    def watch(self, see: Callable[[str, nn.Parameter], None]) -> None:
        """Show the whole weights, which FSDP2 makes, when it has put them in place."""
        for module, owners in self._owned():
            module.register_forward_pre_hook(_showing(owners, see))

    def _owned(self) -> Iterator[tuple[nn.Module, list[tuple[nn.Module, str, str]]]]:
        """Yield the units, each with its weights as of `_owners`."""
        for stage in self._stages:
            for name, module in stage.named_modules():
                if module in self._units:
                    owners = _owners(module, f"{name}." if name else "")
                    yield module, [each for each in owners if each[2] in self.local]

    def set_last_micro_batch(self, last: bool) -> None:
        """Tell FSDP2 which collectives the micro-batch needs."""
        for unit in self._units:
            if self._zero < 3:
                unit.set_reshard_after_backward(last, recurse=False)
            if self._zero < 2:
                unit.set_requires_gradient_sync(last, recurse=False)
            else:
                unit.set_requires_all_reduce(last, recurse=False)

    def begin_backward(self, loss: torch.Tensor) -> None:
        """Refuse a micro-batch in which ranks use different weights."""
        if self._same is not None:
            self._same.check(loss)

    def wait_reduce(self) -> None:
        """Pass FSDP2's gradients to the optimizer. FSDP2 has waited for them at the end of the backward pass."""
        for weight in self.local.values():
            parameter = weight.placed.parameter
            gradient = parameter.grad
            weight.tensor.grad = None if gradient is None else own_part(gradient, placements_of(parameter))

    def reshard(self) -> None:
        """Free gathered weights after passes without a backward pass: the next step would use them, stale."""
        for unit in self._units:
            unit.reshard()


def _owners(unit: nn.Module, prefix: str) -> Iterator[tuple[nn.Module, str, str]]:
    """Yield the weights that FSDP2 gathers with a module: (the module that has one, its attribute, the parameter's name)."""
    for attribute in unit._parameters:
        yield unit, attribute, f"{prefix}{attribute}"
    for name, child in unit.named_children():
        if not isinstance(child, FSDPModule):
            yield from _owners(child, f"{prefix}{name}.")


def _showing(
    owners: Sequence[tuple[nn.Module, str, str]], see: Callable[[str, nn.Parameter], None]
) -> Callable[[nn.Module, object], None]:
    def show(_module: nn.Module, _inputs: object) -> None:
        for owner, attribute, name in owners:
            weight = owner._parameters[attribute]
            if weight is not None:
                see(name, weight)

    return cast(Callable[[nn.Module, object], None], torch.compiler.disable(show))
