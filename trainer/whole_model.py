"""A whole model on one process, whatever the layout: loaded from a checkpoint, or gathered from the engine of a run."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from ..checkpoint.control import Control
from ..checkpoint.errors import CheckpointError
from ..checkpoint.restore import restore
from ..models.protocol import Model
from ..parallel.box import Box
from ..parallel.engine import Engine
from ..parallel.fragment import Fragment
from ..parallel.mesh import Mesh
from .all_ranks import raise_on_all_ranks


def load_whole_model(model: nn.Module, checkpoint: Path | str, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Load a checkpoint's weights, saved on any layout, whole into a model on the meta device. Return it on `device`.

    Raises CheckpointError for a checkpoint that is damaged or lacks some of the weights.
    """
    model = _allocate(model, device, dtype)
    fragments = [
        Fragment(name, "weight", tuple(tensor.shape), Box.whole(tensor.shape), tensor)
        for name, tensor in _saved_tensors(model).items()
    ]
    report = restore(checkpoint, fragments, Control.alone(), strict=False)  # the optimizer's state is not read
    if absent := sorted({*report.missing, *report.mismatched}):
        more = f" and {len(absent) - 4} more" if len(absent) > 4 else ""
        raise CheckpointError(f"{report.source} does not have this model's {', '.join(absent[:4])}{more}")
    return model.eval()


@torch.no_grad()
def gather_whole_model(model: nn.Module, engine: Engine, mesh: Mesh, dtype: torch.dtype) -> nn.Module:
    """Gather the weights of an engine whole into a model on the meta device, on every rank. Every rank must call it.

    Each box is broadcast once, by the first rank that holds it, in `dtype`. Raises PeerFailed where another rank has no memory.
    """
    model = raise_on_all_ranks(mesh, lambda: _allocate(model, mesh.device, dtype))
    whole = _saved_tensors(model)
    held = {(each.name, each.box): each.tensor for each in engine.fragments() if each.role == "weight" and each.name in whole}
    owners: dict[tuple[str, Box], int] = {}
    for rank, boxes in enumerate(mesh.gather_objects(list(held))):
        for box in boxes:
            owners.setdefault(box, rank)
    assert {name for name, _ in owners} == whole.keys(), "some weights lie on no rank"
    for (name, box), owner in owners.items():
        place = whole[name][box.slices()]
        # Rows arrive where they stay; a box of columns needs memory of its own on the way.
        sent = place if place.is_contiguous() else torch.empty(place.shape, dtype=place.dtype, device=place.device)
        if owner == mesh.rank:
            sent.copy_(held[name, box])
        if mesh.layout.world_size > 1:
            dist.broadcast(sent, src=owner)
        if sent is not place:
            place.copy_(sent)
    return model.eval()


def _allocate(model: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Give a model on the meta device memory of its own, in `dtype`, with weights that are tied as before.

    Buffers that learn are no less precise than they were built: a run keeps a router's bias, whose steps are small, in fp32.
    """
    learned = {id(buffer) for buffer in model.saved_buffers().values()} if isinstance(model, Model) else set[int]()
    names: dict[int, str] = {}
    ties: list[tuple[str, str]] = []
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if names.setdefault(id(parameter), name) != name:
            ties.append((name, names[id(parameter)]))

    def give(tensor: torch.Tensor) -> torch.Tensor:
        wanted = tensor.dtype
        if tensor.is_floating_point():
            wanted = torch.promote_types(tensor.dtype, dtype) if id(tensor) in learned else dtype
        return torch.empty_like(tensor, device=device, dtype=wanted) if tensor.is_meta else tensor.to(device, wanted)

    model = model._apply(give)
    for name, source in ties:  # `_apply` gives every use of a tied weight its own storage
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, model.get_parameter(source))
    return model


def _saved_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return what checkpoints hold of a model, by name: its parameters, and buffers that learn."""
    buffers = model.saved_buffers() if isinstance(model, Model) else {}
    return {name: parameter.detach() for name, parameter in model.named_parameters()} | buffers
