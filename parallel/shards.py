"""The box of each parameter on this rank, and the collectives over shards that whole-parameter updates need (rule R4)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from ..optim.optimizers.parameters import LocalMatrices, NamedParameter, WholeMatrices
from .box import Box
from .exchange_groups import choose_levels
from .matrices import MeshMatrices
from .mesh import Mesh

Placements = tuple[Placement, ...]


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor's data on this rank, sharing its storage."""
    return tensor._local_tensor.detach() if isinstance(tensor, DTensor) else tensor.detach()


def placements_of(weight: torch.Tensor) -> Placements | None:
    """Return the placements of a DTensor; None for a plain tensor."""
    return weight.placements if isinstance(weight, DTensor) else None


def own_part(gradient: torch.Tensor, placements: Placements | None) -> torch.Tensor:
    """Return this rank's part of a gradient. Of a tensor-parallel weight it is the box of the rank's part of the weight.

    placements: the weight's. Not the weight itself: a hook that refers to its own weight is a cycle, never collected.

    Autograd gives a weight's gradient in any placement: sums still pending (a norm's under sequence parallelism), or whole
    on every rank (an embedding's). Where the placements differ this is a collective.
    """
    if isinstance(gradient, DTensor) and placements is not None and gradient.placements != placements:
        with torch.no_grad():
            gradient = gradient.redistribute(placements=placements)
    return local(gradient)


def chunk(extent: int, num_shards: int, rank: int) -> tuple[int, int]:
    """Return (start, length) of a rank's part of a dim: equal parts, the last ones shorter or empty."""
    piece = -(-extent // num_shards)
    start = min(rank * piece, extent)
    return start, min(piece, extent - start)


@dataclass(frozen=True)
class Cut:
    """A dim of this extent, cut over the ranks of a group by `chunk`."""

    group: dist.ProcessGroup
    dim: int
    extent: int


@dataclass(frozen=True)
class Placed:
    """One parameter's place: its whole shape, this rank's box, and how many ranks of a pipeline stage hold each element.

    cuts: how the whole was cut, in order, down to this box
    """

    parameter: torch.nn.Parameter
    global_shape: tuple[int, ...]
    box: Box
    copies: int
    cuts: tuple[Cut, ...] = ()

    @classmethod
    def of(cls, parameter: torch.nn.Parameter, mesh: Mesh, outer: DeviceMesh | None = None) -> Placed:
        """Read the place off the DTensor's placements; a plain tensor is whole on every rank.

        outer: ranks that each have equally many other rows of the whole (`WeightAxes`); the parameter is this rank's.
        """
        shape = tuple(parameter.shape)
        if outer is not None:
            shape = (shape[0] * outer.size(), *shape[1:])
        place = cls(parameter, shape, Box.whole(shape), mesh.size("stage"))
        if outer is not None:
            place = place.cut(outer)
        if not isinstance(parameter, DTensor):
            return place
        axes = [(axis, kind) for axis, kind in enumerate(parameter.placements) if isinstance(kind, (Shard, _StridedShard))]
        # FSDP cuts what tensor parallelism left of a dim: DTensor says so by a strided shard, an outer axis cut last. Its own
        # arithmetic for such offsets holds only where everything divides.
        axes.sort(key=lambda each: isinstance(each[1], _StridedShard))
        for axis, kind in axes:
            place = place.cut(parameter.device_mesh, axis, kind.dim)
        held = tuple(local(parameter).shape)
        assert held == place.box.shape, f"{held} held, {place.box.shape} expected"
        return place

    def cut(self, mesh: DeviceMesh, axis: int = 0, dim: int = 0) -> Placed:
        """Cut a dim of the box over the ranks along an axis of a mesh, and return the place of this rank's part."""
        num_shards = mesh.size(axis)
        start, length = chunk(self.box.shape[dim], num_shards, mesh.get_local_rank(axis))
        cuts = (*self.cuts, Cut(mesh.get_group(axis), dim, self.box.shape[dim]))
        return replace(self, box=self.box.cut(dim, start, length), copies=self.copies // num_shards, cuts=cuts)


class MeshShards:
    """`Shards` over a mesh. Each method but `scatter` is a collective."""

    def __init__(self, mesh: Mesh, placed: dict[str, Placed], exchange: str) -> None:
        """exchange: `parallel.gradient_exchange`."""
        self._mesh = mesh
        self._placed = placed
        self._exchange = exchange
        self._copies: dict[tuple[object, ...], torch.Tensor] = {}  # of lists of parameters: the same few in every step

    def _copies_of(self, parameters: Sequence[NamedParameter], like: torch.Tensor) -> torch.Tensor:
        """Return the copies of each element, (len(parameters), 1, …), to divide `like` by. Cached: the copy blocks."""
        key = (tuple(p.name for p in parameters), like.dim(), like.dtype, like.device)
        if key not in self._copies:
            copies = torch.tensor([self._placed[p.name].copies for p in parameters], dtype=like.dtype, device=like.device)
            self._copies[key] = copies.view(-1, *(1 for _ in like.shape[1:]))
        return self._copies[key]

    def sum(self, values: torch.Tensor, parameters: Sequence[NamedParameter]) -> torch.Tensor:
        """Sum values (len(parameters), …) over the shards of each parameter, counting its copies once."""
        return self._mesh.sum(values / self._copies_of(parameters, values), "stage")

    def across_stages(self, values: torch.Tensor) -> torch.Tensor:
        """Sum values (the same on all ranks of a stage) over the pipeline's stages."""
        return self._mesh.sum(values.clone(), "pp")

    def gather(self, parameter: NamedParameter, local: torch.Tensor) -> torch.Tensor:
        """Gather the whole array of which `local` is this rank's shard."""
        placed = self._placed[parameter.name]
        whole = local
        for cut in reversed(placed.cuts):
            num_shards = cut.group.size()
            shape = list(whole.shape)
            shape[cut.dim] = -(-cut.extent // num_shards)
            mine = whole.new_zeros(shape)
            mine.narrow(cut.dim, 0, whole.shape[cut.dim]).copy_(whole)
            pieces = [torch.empty_like(mine) for _ in range(num_shards)]
            dist.all_gather(pieces, mine, cut.group)
            whole = torch.cat(pieces, cut.dim).narrow(cut.dim, 0, cut.extent)
        return whole

    def scatter(self, parameter: NamedParameter, whole: torch.Tensor) -> torch.Tensor:
        """Return this rank's shard of a whole array."""
        return whole[self._placed[parameter.name].box.slices()]

    def whole_matrices(self, parameters: Sequence[NamedParameter], cost: Callable[[int, int], float]) -> WholeMatrices:
        """Share the matrices out among the ranks of the stage that hold them."""
        if self._mesh.size("stage") == 1:
            return LocalMatrices(parameters)
        levels = choose_levels(self._mesh, self._mesh.axes["stage"], self._exchange, "whole matrices travel")
        boxes = {each.name: self._placed[each.name].box for each in parameters}
        return MeshMatrices(self._mesh, boxes, parameters, cost, levels)
