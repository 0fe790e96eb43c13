"""ZeRO-0 and 1, and a single data-parallel rank: every rank computes with whole weights and updates its part of their masters.

Weights lie whole in the dtype of the compute. Beside them are the masters, in at least fp32, of the part that this rank
updates: rows of each weight under ZeRO-1, all of it otherwise. Where both have one dtype the masters are those very rows.

A step communicates once. A gradient stays as the backward pass made it (micro-batches are added up in the masters' dtype);
when a block's are complete, each rank sends every other the rows that are its own to update, in whatever dtype they have,
and the owner adds up what it got in the masters' dtype. A bf16 gradient so costs half the bytes of a reduction in fp32 and
loses nothing on the way. Copies of the same rows (HSDP, ZeRO-0) then add up their sums, in the masters' dtype. After the update
the rows are gathered into the whole weights, and a block waits for its own only when it is called. FSDP2 would cast and copy
all weights in each pass, and widen gradients before it sends them.

Where tensor-parallel ranks each have a part of a sum (a norm's gradient under sequence parallelism), the parts are added up
over micro-batches first and over the ranks once, when the gradient is complete.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from ...kernels.rows import sum_rows
from ...models.llama import Llama
from ..mesh import Mesh
from ..shards import Placements, chunk, local, own_part
from .transport import Transport, gather_rows


def materialize(model: Llama, dtype: torch.dtype, device: torch.device, transport: Transport) -> None:
    """Give a model on the meta device storage without values, where weights can be gathered. A tied head stays tied."""
    model.to(dtype)
    weights = list(model.parameters())  # a tied one once; held here, so that none's id becomes another's
    places = transport.lasting([local(weight).shape for weight in weights], dtype)
    placed = {id(weight): place for weight, place in zip(weights, places, strict=True)}

    def give(tensor: torch.Tensor) -> torch.Tensor:
        place = placed.get(id(tensor))
        if place is None:  # a buffer
            return torch.empty_like(tensor, device=device)
        if not isinstance(tensor, DTensor):
            return place
        here, placements = tensor.device_mesh, tensor.placements
        return DTensor.from_local(place, here, placements, run_check=False, shape=tensor.shape, stride=tensor.stride())

    model._apply(give)
    if model.tied and model.head is not None and model.embed is not None:
        model.head.weight = model.embed.weight


@dataclass
class _Weight:
    """One weight, and what is updated of it.

    placed  how tensor-parallel ranks hold it, where they do. Not the parameter: that has a hook which knows of this, and
            such a circle is never collected
    whole   its data on this rank, which it is computed with
    rows    of each rank's part of `whole`, the last ones' fewer; own: this rank's
    """

    placed: tuple[DeviceMesh, Placements] | None
    whole: torch.Tensor
    rows: int
    own: torch.Tensor
    master: nn.Parameter

    @property
    def room(self) -> int:
        """Elements of a part that is not cut short."""
        return self.rows * self.whole[0].numel()

    def pending(self, gradient: torch.Tensor) -> Placements | None:
        """The placements of a gradient that is to be summed over tensor-parallel ranks, which all hold the whole weight."""
        if not isinstance(gradient, DTensor) or self.placed is None:
            return None
        pairs = list(zip(gradient.placements, self.placed[1], strict=True))
        sums = any(here.is_partial() for here, _ in pairs)
        as_large = all(here == there or (here.is_partial() and there.is_replicate()) for here, there in pairs)
        return gradient.placements if sums and as_large else None

    def part(self, gradient: torch.Tensor) -> torch.Tensor:
        """What a gradient has where this rank's part of the weight lies: a collective, if that must be added up first."""
        return own_part(gradient, None if self.placed is None else self.placed[1])

    def summed(self, parts: torch.Tensor, placements: Placements) -> torch.Tensor:
        """What tensor-parallel ranks have of a gradient in such placements, added up: a collective."""
        assert self.placed is not None
        return self.part(DTensor.from_local(parts, self.placed[0], placements, run_check=False))

    def give(self, gradient: torch.Tensor | None) -> None:
        """Add to the master's gradient; None: the weight was not used."""
        if gradient is not None and self.master.grad is not None:
            self.master.grad += gradient
        elif gradient is not None:
            self.master.grad = gradient


@dataclass
class _Group:
    """Weights whose gradients are sent together, and which are gathered before the same modules are called.

    taken    gradients so far, of the micro-batches since the last exchange
    pending  by number of the weight, in which placements one is that must still be summed over tensor-parallel ranks
    missing  how many of them the micro-batch that completes them has not brought yet
    used     which weights those on their way are of
    moving   what is on its way, the collective that brings it, and what is to be done with it then
    """

    weights: list[_Weight]
    mesh: Mesh
    transport: Transport
    taken: list[torch.Tensor | None] = field(init=False)
    pending: dict[int, Placements] = field(init=False)
    missing: int = field(init=False)
    used: list[bool] = field(default_factory=list)
    moving: tuple[torch.Tensor, Any, Callable[[torch.Tensor], None]] | None = None
    gathering: list[tuple[Any, Sequence[tuple[torch.Tensor, torch.Tensor]]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.clear()

    @property
    def room(self) -> int:
        """Elements of a rank's parts, none of them cut short."""
        return sum(weight.room for weight in self.weights)

    def clear(self) -> None:
        """Forget the gradients that were taken."""
        self.taken, self.pending = [None] * len(self.weights), {}
        self.missing, self.moving = len(self.weights), None

    def give_up(self) -> None:
        """Of a pass that failed: wait for what it left on its way, and forget it. The memory will be used again."""
        if self.moving is not None:
            self.moving[1].wait()
        self.clear()

    def add(self, index: int, gradient: torch.Tensor, keep_dtype: bool) -> None:
        """One micro-batch's gradient of a weight. keep_dtype: it may stay in the one it has if it is the only one."""
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

    def _sum_pending(self, index: int) -> None:
        parts, placements = self.taken[index], self.pending.pop(index, None)
        if parts is not None and placements is not None:
            self.taken[index] = self.weights[index].summed(parts, placements)

    def send(self) -> None:
        """Begin to send every rank its rows of the gradients, which are complete here; of a weight without one, zeros."""
        for index in sorted(self.pending):
            self._sum_pending(index)
        ways, shared = self.mesh.size("weights"), self.mesh.size("data") > 1
        taken, like = self.taken, next(gradient for gradient in self.taken if gradient is not None)
        self.clear()
        if not shared:
            for weight, gradient in zip(self.weights, taken, strict=True):
                weight.give(gradient)
            return
        self.used = [gradient is not None for gradient in taken]
        gradients = [
            like.new_zeros(weight.whole.shape) if gradient is None else gradient.contiguous()
            for weight, gradient in zip(self.weights, taken, strict=True)
        ]
        if ways == 1:
            self._sum_copies(torch._chunk_cat(gradients, 0, ways))
        else:
            parts, received = self.transport.parcels((ways, self.room), like)
            torch._chunk_cat(gradients, 0, ways, out=parts)
            work = dist.all_to_all_single(received, parts, group=self.transport.group, async_op=True)
            self.moving = received, work, self._sum_copies

    def advance(self) -> bool:
        """Wait for what is on its way and go on with it. Whether that was the last of it."""
        if self.moving is not None:
            arriving, work, then = self.moving
            self.moving = None
            work.wait()
            then(arriving)
        return self.moving is None

    def _sum_copies(self, parts: torch.Tensor) -> None:
        """parts (ranks, rows): summed here, and over the ranks that hold copies of the same rows."""
        dtype = self.weights[0].master.dtype
        total = parts[0].to(dtype) if len(parts) == 1 else sum_rows(parts, dtype)
        if self.mesh.size("copies") == 1:
            self._give(total)
        else:
            self.moving = total, dist.all_reduce(total, group=self.mesh.group("copies"), async_op=True), self._give

    def _give(self, total: torch.Tensor) -> None:
        at = 0
        for weight, used in zip(self.weights, self.used, strict=True):
            weight.give(total[at : at + weight.own.numel()].view_as(weight.own) if used else None)
            at += weight.room

    def gather(self) -> None:
        """Begin to bring all ranks' rows together in the whole weights."""
        ways, rank, group = self.mesh.size("weights"), self.mesh.axes["weights"].get_local_rank(), self.transport.group
        pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        uneven: list[tuple[torch.Tensor, torch.Tensor]] = []
        for weight in self.weights:
            whole, own = weight.whole, weight.own
            if len(whole) != ways * weight.rows:
                whole = whole.new_empty(ways * weight.rows, *whole.shape[1:])
                uneven.append((weight.whole, whole))
                own = whole.narrow(0, rank * weight.rows, weight.rows)
                own[: len(weight.own)].copy_(weight.own)
            pairs.append((whole, own))
        if self.mesh.device.type == "cuda":
            with dist._coalescing_manager(group, async_ops=True) as together:
                for whole, own in pairs:
                    gather_rows(whole, own, group=group)
            self.gathering = [(together, uneven)]
        else:
            works = [gather_rows(whole, own, group=group, async_op=True) for whole, own in pairs]
            self.gathering = [*((work, ()) for work in works[:-1]), (works[-1], uneven)]

    def wait(self, obsolete: bool = False) -> None:
        """Until the weights are whole again. obsolete: rows have changed since, and will be gathered anew."""
        for work, uneven in self.gathering:
            work.wait()
            for whole, padded in () if obsolete else uneven:
                whole.copy_(padded[: len(whole)])
        self.gathering = []


class MasterWeights:
    """The masters of this rank, by name: what optimizers and checkpoints see. Their gradients come in the backward pass.

    own       by name, the rows of the whole weights that the masters are of
    separate  whether masters are tensors of their own; otherwise they are those very rows
    """

    def __init__(
        self,
        stages: Iterable[Llama],
        named: Mapping[str, nn.Parameter],
        mesh: Mesh,
        exact: torch.dtype,
        transport: Transport,
    ) -> None:
        """named: the stages' parameters on their device, whole but for tensor parallelism; exact: dtype of the masters."""
        self._mesh = mesh
        self._narrow = self._completes = False
        self._current = False  # whether weights are their masters' values, or on the way to be
        self._sending: list[_Group] = []
        self.masters: dict[str, nn.Parameter] = {}
        self.own: dict[str, torch.Tensor] = {}
        self._groups: list[_Group] = []
        names = {parameter: name for name, parameter in named.items()}
        for stage in stages:
            for modules, parameters in weight_groups(stage):
                group = _Group([self._weight(names[parameter], parameter, exact) for parameter in parameters], mesh, transport)
                self._groups.append(group)
                transport.expect(mesh.size("weights") * group.room)
                for index, parameter in enumerate(parameters):
                    parameter.register_post_accumulate_grad_hook(self._delivery(group, index))
                if mesh.size("weights") > 1:
                    for module in modules:
                        module.register_forward_pre_hook(_waiting(group))
        self.separate = any(own.dtype != exact for own in self.own.values())

    def _weight(self, name: str, parameter: nn.Parameter, exact: torch.dtype) -> _Weight:
        whole, ways = local(parameter), self._mesh.size("weights")
        own = whole.narrow(0, *chunk(len(whole), ways, self._mesh.axes["weights"].get_local_rank()))
        master = nn.Parameter(own if own.dtype == exact else torch.empty_like(own, dtype=exact))
        master.grad_dtype = None  # any will do
        self.masters[name], self.own[name] = master, own
        placed = (parameter.device_mesh, parameter.placements) if isinstance(parameter, DTensor) else None
        return _Weight(placed, whole, -(-len(whole) // ways), own, master)

    def _delivery(self, group: _Group, index: int) -> Callable[[torch.Tensor], None]:
        @torch.no_grad()
        def deliver(computed: torch.Tensor) -> None:
            assert computed.grad is not None
            gradient, computed.grad = computed.grad, None
            group.add(index, gradient, self._narrow)
            group.missing -= self._completes
            if not group.missing:
                self._send(group)

        return deliver

    def _send(self, group: _Group) -> None:
        # The next block's gradients were computed while the last one's were on their way; these have arrived by now.
        self._sending = [before for before in self._sending if not before.advance()]
        group.send()
        self._sending.append(group)

    def begin(self, passes: int, one_pass: bool) -> None:
        """Before a step's first forward pass.

        passes: the largest number of micro-batches that any rank runs, so that all ranks exchange gradients in one dtype.
        one_pass: the optimizer takes gradients in the dtype of the compute.
        """
        for group in self._sending:
            group.give_up()
        self._sending = []
        for group in self._groups:
            group.clear()
        # What is sent is added up in the masters' dtype by whoever gets it, so nothing has to be widened before.
        self._narrow = passes == 1 and (one_pass or self._mesh.size("data") > 1)
        self.refresh()

    def expect(self, last: bool) -> None:
        """Before a micro-batch's forward pass. last: gradients must be complete after it."""
        self._completes = last

    @torch.no_grad()
    def complete(self) -> None:
        """After a micro-batch that completes the gradients: until all have arrived."""
        for group in self._groups:
            if any(gradient is not None for gradient in group.taken):  # it waits for weights that this step did not use
                self._send(group)
        while self._sending:
            self._sending = [group for group in self._sending if not group.advance()]

    def refresh(self) -> None:
        """Bring the whole weights up to date with the masters, where somebody else than the optimizer wrote to those."""
        if not self._current:
            self.spread(copied=False)

    def written(self) -> None:
        """Somebody other than the optimizer wrote to the masters, on every rank."""
        self._current = False

    @torch.no_grad()
    def settle(self, rows: bool = False) -> None:
        """Before masters are read or written: until no gathering touches them. rows: what is computed with is written, too."""
        if rows or not self.separate:
            for group in self._groups:
                group.wait()

    @torch.no_grad()
    def spread(self, copied: bool) -> None:
        """After an update: begin to make the whole weights of the masters. copied: it wrote this rank's rows of them, too."""
        # In case nobody has asked for what came before: an earlier gathering may write this rank's rows as it found them.
        for group in self._groups:
            group.wait(obsolete=True)
        if self.separate and not copied:
            torch._foreach_copy_(list(self.own.values()), list(self.masters.values()))
        if self._mesh.size("weights") > 1:
            for group in self._groups:
                group.gather()
        self._current = True


def _waiting(group: _Group) -> Callable[[nn.Module, object], None]:
    def wait(_module: nn.Module, _inputs: object) -> None:
        if group.gathering:
            group.wait()

    return cast(Callable[[nn.Module, object], None], torch.compiler.disable(wait))


def weight_groups(stage: Llama) -> Iterator[tuple[list[nn.Module], list[nn.Parameter]]]:
    """What of a stage travels together, in the order of the forward pass: weights, and the modules before whose call they must
    be whole. FSDP2 gets the same groups (`fully_sharded.py`).
    """
    rest = dict.fromkeys(stage.parameters())
    parts: list[nn.Module] = [*([stage.embed] if stage.embed is not None and not stage.tied else []), *stage.layers.values()]
    for part in parts:
        own = list(part.parameters())
        for parameter in own:
            del rest[parameter]
        yield [part], own
    if rest:
        # The norm, and the head, whose weight the loss reads behind the norm; a tied one is read at the beginning, too.
        readers: list[nn.Module] = [
            module for module in (stage.embed if stage.tied else None, stage.norm) if module is not None
        ]
        yield readers, list(rest)
