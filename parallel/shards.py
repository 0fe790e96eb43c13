"""Where each parameter of a DTensor model lies, and the sums over shards that whole-parameter updates need (rule R4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from ..optim.parameters import NamedParameter
from .fragment import Box
from .mesh import Mesh


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's data on this rank, sharing its storage."""
    return tensor._local_tensor.detach() if isinstance(tensor, DTensor) else tensor.detach()


def own_part(gradient: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """This rank's part of a gradient: of a tensor-parallel weight, what lies where the rank's part of the weight does.

    Autograd gives a weight's gradient in any placement: sums still pending (a norm's under sequence parallelism), or whole
    on every rank (an embedding's). Where the placements differ this is a collective.
    """
    if isinstance(gradient, DTensor) and isinstance(weight, DTensor) and gradient.placements != weight.placements:
        with torch.no_grad():
            gradient = gradient.redistribute(placements=weight.placements)
    return local(gradient)


@dataclass(frozen=True)
class Cut:
    """A dim of this extent, cut over an axis of the parameter's mesh into equal pieces, the last ones shorter or empty."""

    axis: int
    dim: int
    extent: int


@dataclass(frozen=True)
class Placed:
    """One parameter's place: its whole shape, this rank's box, and how many ranks of a pipeline stage hold each element.

    cuts: what was done to the whole, in order, until this box was left
    """

    parameter: torch.nn.Parameter
    global_shape: tuple[int, ...]
    box: Box
    copies: int
    cuts: tuple[Cut, ...] = ()

    @classmethod
    def of(cls, parameter: torch.nn.Parameter, mesh: Mesh) -> Placed:
        """Read the place off the DTensor's placements; a plain tensor is whole on every rank."""
        stage = mesh.size("stage")
        shape = tuple(parameter.shape)
        if not isinstance(parameter, DTensor):
            return cls(parameter, shape, Box.whole(shape), stage)
        axes = [(axis, kind) for axis, kind in enumerate(parameter.placements) if isinstance(kind, (Shard, _StridedShard))]
        # FSDP cuts what tensor parallelism left of a dim: DTensor says so by a strided shard, an outer axis cut last. Its own
        # arithmetic for such offsets holds only where everything divides.
        axes.sort(key=lambda each: isinstance(each[1], _StridedShard))
        coordinate = parameter.device_mesh.get_coordinate()
        assert coordinate is not None
        extent, offsets, sharded = list(shape), [0] * len(shape), 1
        cuts: list[Cut] = []
        for axis, kind in axes:
            cuts.append(Cut(axis, kind.dim, extent[kind.dim]))
            size = parameter.device_mesh.size(axis)
            piece = -(-extent[kind.dim] // size)
            start = min(coordinate[axis] * piece, extent[kind.dim])
            extent[kind.dim] = min(piece, extent[kind.dim] - start)
            offsets[kind.dim] += start
            sharded *= size
        assert tuple(local(parameter).shape) == tuple(extent), f"{tuple(local(parameter).shape)} held, {extent} expected"
        return cls(parameter, shape, Box(tuple(offsets), tuple(extent)), stage // sharded, tuple(cuts))


class MeshShards:
    """`Shards` over a mesh: every question is one collective over the ranks of this pipeline stage."""

    def __init__(self, mesh: Mesh, placed: dict[str, Placed]) -> None:
        self._mesh = mesh
        self._placed = placed

    def sum(self, values: torch.Tensor, parameters: Sequence[NamedParameter]) -> torch.Tensor:
        """values (len(parameters), …) summed over the shards of each parameter, its copies counted once."""
        copies = torch.tensor([self._placed[p.name].copies for p in parameters], dtype=values.dtype, device=values.device)
        counted_once = values / copies.view(-1, *(1 for _ in values.shape[1:]))
        return self._mesh.sum(counted_once, "stage")

    def across_stages(self, values: torch.Tensor) -> torch.Tensor:
        """values (the same on all ranks of a stage) summed over the pipeline's stages."""
        return self._mesh.sum(values.clone(), "pp")

    def gather(self, parameter: NamedParameter, local: torch.Tensor) -> torch.Tensor:
        """The whole array of which `local` is this rank's shard."""
        placed = self._placed[parameter.name]
        whole = local
        for cut in reversed(placed.cuts):
            mesh = cast(DTensor, placed.parameter).device_mesh
            shape = list(whole.shape)
            shape[cut.dim] = -(-cut.extent // mesh.size(cut.axis))
            mine = whole.new_zeros(shape)
            mine.narrow(cut.dim, 0, whole.shape[cut.dim]).copy_(whole)
            pieces = [torch.empty_like(mine) for _ in range(mesh.size(cut.axis))]
            dist.all_gather(pieces, mine, mesh.get_group(cut.axis))
            whole = torch.cat(pieces, cut.dim).narrow(cut.dim, 0, cut.extent)
        return whole

    def scatter(self, parameter: NamedParameter, whole: torch.Tensor) -> torch.Tensor:
        """This rank's shard of a whole array."""
        return whole[self._placed[parameter.name].box.slices()]
