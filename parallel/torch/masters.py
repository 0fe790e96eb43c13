"""Whole weights with sharded masters: ZeRO-0 and 1, and a single data-parallel rank.

Weights are whole, in the compute dtype. Beside them are the masters, in at least fp32, of the part that this rank updates:
rows of each weight under ZeRO-1, all of it otherwise. Where both have one dtype the masters are views of those rows.

A step communicates once. A gradient keeps its dtype from the backward pass (several micro-batches are summed in the masters'
dtype). When a unit's are complete, each rank sends every other rank the rows that it updates, in the dtype they have, and the
receiver sums them in the masters' dtype. A bf16 gradient thus costs half the bytes of a reduction in fp32, and the exchange
rounds nothing. Copies of the same rows (HSDP, ZeRO-0) then add up their sums, in the masters' dtype. After the update the
rows are gathered into the whole weights, and a block waits for its own only when it is called. FSDP2 would cast and copy all
weights in each pass, and widen gradients before it sends them.

Where tensor-parallel ranks each have a part of a sum (a norm's gradient under sequence parallelism), the parts are added up
over micro-batches first and over the ranks once, when the gradient is complete.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from ...kernels.rounding import KeptWeight
from ...models.protocol import Model
from ..fragment import Fragment
from ..mesh import Mesh
from ..shards import Placed, chunk, local
from .exchange import ExchangeUnit, GradientReducer, MasterWeight
from .groups import ParameterGroup, gather_units, split_by_group
from .rounded_masters import RoundedMasters
from .strategy import LocalWeight, WeightStrategy
from .transport import Transport
from .used_weights import UsedWeights


class MasterWeights(WeightStrategy):
    """See the module's docstring."""

    def __init__(
        self,
        group: ParameterGroup,
        groups: Sequence[ParameterGroup],
        mesh: Mesh,
        transport: Transport,
        exchange_groups: Sequence[dist.ProcessGroup],
        *,
        compute: torch.dtype,
        accum_dtype: torch.dtype,
        may_skip: bool,
        masters: str = "full",
        seed: int = 0,
    ) -> None:
        """groups: all of the model's; compute: dtype of the whole weights; accum_dtype: of masters and sums of gradients.

        exchange_groups: groups in which gradients are exchanged, from the innermost outwards
        may_skip: whether ranks may use different weights (`models.protocol.may_skip_weights`)
        masters: one of `trainer.masters`; seed: of their rounding
        """
        super().__init__()
        self._group, self._groups = group, groups
        self._mesh, self._axes, self._transport = mesh, mesh.weight_axes[group.name], transport
        self._exchange_groups = exchange_groups
        self._compute, self._accum_dtype = compute, accum_dtype
        self._kind, self._seed = masters, seed
        self._rounded: RoundedMasters | None = None
        self._separate = False  # whether masters are tensors of their own
        self._current = False  # whether weights are their masters' values, or on the way to be
        self._reducer = GradientReducer(mesh.compute_time.waiting)
        self._may_skip = may_skip
        self._used: UsedWeights | None = None
        self.units: list[ExchangeUnit] = []

    def shard(self, stage: Model) -> None:
        """Allocate the group's weights, uninitialised, where they can be gathered."""
        own, _ = split_by_group(stage, self._group, self._groups)
        materialize(stage, list(own.values()), self._compute, self._mesh.device, self._transport)

    def adopt(self, stages: Sequence[Model], named: Mapping[str, nn.Parameter]) -> None:
        """Make the masters, and register hooks on gradients and calls of the whole weights."""
        parameters: dict[ExchangeUnit, list[nn.Parameter]] = {}
        names = {parameter: name for name, parameter in named.items()}
        for stage in stages:
            for unit in gather_units(stage, self._group, self._groups):
                if not unit.weights:
                    continue
                weights = [self._add(names[weight], weight) for weight in unit.weights]
                sent = ExchangeUnit(weights, self._axes, self._transport, self._exchange_groups)
                self.units.append(sent)
                parameters[sent] = unit.weights
                self._transport.reserve(self._axes.num_shards * sent.padded_numel)
                for index, parameter in enumerate(unit.weights):
                    parameter.register_post_accumulate_grad_hook(self._reducer.hook(sent, index))
                if self._axes.num_shards > 1:
                    for module in unit.readers:
                        module.register_forward_pre_hook(_waiting(sent))
        if self._may_skip and self._axes.shared:
            self._used = UsedWeights(parameters, self._axes, self._mesh.compute_time.waiting)
        self._separate = any(weight.compute_copy is not None for weight in self.local.values())
        if self._kind != "full":
            self._rounded = RoundedMasters(self.local, self._kind, self._seed)

    def _add(self, name: str, parameter: nn.Parameter) -> MasterWeight:
        whole, num_shards = local(parameter), self._axes.num_shards
        shard = whole.narrow(0, *chunk(len(whole), num_shards, self._axes.shards.get_local_rank()))
        separate = shard.dtype != self._accum_dtype
        master = nn.Parameter(torch.empty_like(shard, dtype=self._accum_dtype) if separate else shard)
        master.grad_dtype = None  # any will do
        placed = Placed.of(parameter, self._mesh, self._axes.outer).cut(self._axes.shards)
        self.local[name] = LocalWeight(placed, master, shard if separate else None, rounded=self._kind != "full")
        over_tp = (parameter.device_mesh, parameter.placements) if isinstance(parameter, DTensor) else None
        return MasterWeight(over_tp, whole, -(-len(whole) // num_shards), shard, master)

    def watch(self, see: Callable[[str, nn.Parameter], None]) -> None:
        """Show the whole weights, which exist from the start."""
        for name, weight in self.local.items():
            see(name, weight.placed.parameter)

    def begin_step(self, *, single: bool, fused: bool) -> None:
        """Discard what a failed pass has left, and bring the weights up to date."""
        self._reducer.abandon()
        for unit in self.units:
            unit.clear()
        # The receiver sums in the masters' dtype, so gradients need not be widened before they are sent.
        self._reducer.keep_grad_dtype = single and (fused or self._axes.shared)
        self.sync_from_masters()

    def set_last_micro_batch(self, last: bool) -> None:
        """Send a unit's gradients as soon as this micro-batch has completed them, or not."""
        self._reducer.last = last

    def begin_backward(self, loss: torch.Tensor) -> None:
        """Send no gradient before the end of a last backward pass in which ranks use different weights."""
        if self._used is not None and self._reducer.last and self._used.differ(loss):
            self._reducer.last = False

    @torch.no_grad()
    def wait_reduce(self) -> None:
        """Wait until all gradients have arrived at their masters."""
        if self._used is not None:
            self._used.fill(self._reducer.keep_grad_dtype)
        for unit in self.units:
            if any(gradient is not None for gradient in unit.taken):  # it waits for weights that this step did not use
                self._reducer.reduce(unit)
        self._reducer.wait()

    @torch.no_grad()
    def wait_all_gather(self, *, compute_copies: bool) -> None:
        """Wait until no gather reads the masters, where they are rows of the weights, or what the optimizer writes."""
        if compute_copies or not self._separate:
            for unit in self.units:
                unit.wait_all_gather()

    @torch.no_grad()
    def all_gather_weights(self, *, copied: bool) -> None:
        """Start to all-gather the whole weights from the masters."""
        # An earlier gather may still be pending, and would overwrite this rank's rows with their old values.
        for unit in self.units:
            unit.wait_all_gather(obsolete=True)
        if self._rounded is not None:
            self._rounded.round()
        elif self._separate and not copied:
            copies = [weight.compute_copy for weight in self.local.values() if weight.compute_copy is not None]
            torch._foreach_copy_(copies, [weight.tensor for weight in self.local.values()])
        if self._axes.num_shards > 1:
            for unit in self.units:
                unit.all_gather()
        self._current = True

    def begin_update(self, *, rounded: bool) -> Mapping[torch.Tensor, KeptWeight]:
        """Make the masters from the weights, where they exist only during an update that can't do without them."""
        if self._rounded is None:
            return {}
        kept = self._rounded.kept() if rounded else {}
        if not kept:
            self._rounded.make()
        return kept

    def fragments(self) -> Iterator[Fragment]:
        """Yield what masters that exist only during an update leave behind.

        What is stored in their place are rows of the whole weights, which a restore writes to: no gather may do so after it.
        """
        if self._rounded is not None:
            for unit in self.units:
                unit.wait_all_gather()
            yield from self._rounded.fragments()

    def counters(self) -> dict[str, float]:
        """Return the number of roundings, where they are drawn by it."""
        return {} if self._rounded is None else self._rounded.counters

    def load_counters(self, counters: Mapping[str, float]) -> None:
        """Set the number of roundings."""
        if self._rounded is not None:
            self._rounded.counters = {name: counters.get(name, value) for name, value in self._rounded.counters.items()}

    def sync_from_masters(self) -> None:
        """Bring the whole weights up to date with the masters after a restore or initialisation wrote to them."""
        if not self._current:
            self.all_gather_weights(copied=False)

    def masters_written(self) -> None:
        """Mark the whole weights as outdated."""
        self._current = False


def materialize(
    stage: Model, weights: Sequence[nn.Parameter], dtype: torch.dtype, device: torch.device, transport: Transport
) -> None:
    """Allocate these weights of a stage, on the meta device, uninitialised, where they can be gathered.

    Shared weights stay shared, and buffers go to the device. The caller must keep the weights alive, so that their ids stay
    unique.
    """
    places = transport.permanent([local(weight).shape for weight in weights], dtype)
    placed = {id(weight): place for weight, place in zip(weights, places, strict=True)}

    def give(tensor: torch.Tensor) -> torch.Tensor:
        place = placed.get(id(tensor))
        if place is None:
            return tensor if isinstance(tensor, nn.Parameter) else tensor.to(device)
        if not isinstance(tensor, DTensor):
            return place
        here, placements = tensor.device_mesh, tensor.placements
        return DTensor.from_local(place, here, placements, run_check=False, shape=tensor.shape, stride=tensor.stride())

    shared = list(_shared_weights(stage))
    stage._apply(give)
    for (module, key), (owner, name) in shared:
        module.register_parameter(key, owner._parameters[name])


def _shared_weights(stage: nn.Module) -> Iterator[tuple[tuple[nn.Module, str], tuple[nn.Module, str]]]:
    """Find the uses of weights that another module has, too: (module, attribute), and those of the first that has it."""
    first: dict[nn.Parameter, tuple[nn.Module, str]] = {}
    for module in stage.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None and first.setdefault(parameter, (module, key)) != (module, key):
                yield (module, key), first[parameter]


def _waiting(unit: ExchangeUnit) -> Callable[[nn.Module, object], None]:
    def wait(_module: nn.Module, _inputs: object) -> None:
        if unit.gathering:
            unit.wait_all_gather()

    return cast(Callable[[nn.Module, object], None], torch.compiler.disable(wait))
