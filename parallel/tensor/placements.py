"""Tensor and sequence parallelism: a placement for each role that a module may have, applied through DTensor.

Which module has which role its parent says (`models.protocol.TensorRole`).

Column-parallel projections into heads and the feed-forward, row-parallel projections out of them (Megatron-LM, arXiv
1909.08053); between them the residual stream is either whole on every rank or, with sequence parallelism, cut along the
sequence (arXiv 2205.05198). Embedding and head are cut by vocabulary.

The residual stream is a plain local tensor; a norm turns it into a DTensor, the projections behind it into plain tensors
again, so that attention and everything elementwise sees ordinary tensors of this rank's heads.

What lies between the collectives works on each token alone, so sequence parallelism may cut a batch of B sequences anywhere:
it cuts between sequences where B divides by the ranks (the collectives then move contiguous memory), otherwise inside them.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from ...kernels.documents import Documents
from ...models.mixture.ledger import Routing
from ...models.norm import Norm
from ...models.protocol import Model, TensorRole
from .heads import Heads, HeadsWork, work_on_heads
from .tokens import distributed, work_on_tokens
from .vocabulary import VocabularyParallelLoss

STREAM: Literal["stream"] = "stream"  # where the residual stream lies; it depends on the batch
Where = Placement | Literal["stream"]


@dataclass(frozen=True)
class TensorPlace:
    """The placements of one module's weight, input and output on the tensor-parallel axis.

    weight            placement of its weight
    input_layout      placement of its input, for one that arrives as a plain tensor
    output_layout     placement its output is brought to
    use_local_output  whether the output leaves as a plain local tensor
    gradient          placement of the gradient of such an output; None: as the output's
    """

    weight: Placement
    input_layout: Where
    output_layout: Where
    use_local_output: bool = True
    gradient: Placement | None = None


PLACES = {
    TensorRole.COLUMN: TensorPlace(weight=Shard(0), input_layout=Replicate(), output_layout=Shard(-1)),
    TensorRole.KEY_VALUE: TensorPlace(weight=Shard(0), input_layout=Replicate(), output_layout=Shard(-1)),
    TensorRole.ROW: TensorPlace(weight=Shard(1), input_layout=Shard(-1), output_layout=STREAM),
    TensorRole.NORM: TensorPlace(weight=Replicate(), input_layout=STREAM, output_layout=Replicate(), use_local_output=False),
    TensorRole.POST_NORM: TensorPlace(weight=Replicate(), input_layout=STREAM, output_layout=STREAM),
    TensorRole.HEADS_NORM: TensorPlace(weight=Shard(0), input_layout=Shard(-1), output_layout=Shard(-1)),
    TensorRole.KEY_HEADS_NORM: TensorPlace(weight=Shard(0), input_layout=Shard(-1), output_layout=Shard(-1)),
    TensorRole.HEADS_VECTOR: TensorPlace(weight=Shard(0), input_layout=Replicate(), output_layout=Shard(0)),
    TensorRole.LATENT: TensorPlace(Replicate(), input_layout=Replicate(), output_layout=Replicate(), use_local_output=False),
    TensorRole.SHARED: TensorPlace(Replicate(), input_layout=Replicate(), output_layout=Replicate(), gradient=Partial()),
    TensorRole.EMBEDDING: TensorPlace(weight=Shard(0), input_layout=Replicate(), output_layout=STREAM),
    TensorRole.TOKENS: TensorPlace(weight=Replicate(), input_layout=STREAM, output_layout=STREAM),
    TensorRole.HEAD: TensorPlace(weight=Shard(0), input_layout=Replicate(), output_layout=Replicate()),
}


ON_HEADS = (TensorRole.KEY_VALUE, TensorRole.HEADS_NORM, TensorRole.KEY_HEADS_NORM, TensorRole.HEADS_VECTOR)
"""Roles of modules inside attention, which see plain tensors of a rank's own heads."""


def stream_dim(batch: int, length: int, tp: int) -> int | None:
    """Return the dim along which sequence parallelism cuts a stream of (batch, length) tokens: 0, 1, or None if it can't."""
    return 0 if batch % tp == 0 else 1 if length % tp == 0 else None


class Stream:
    """The present placement of the residual stream, set before every forward pass."""

    def __init__(self, tp: int, sequence_parallel: bool) -> None:
        self.tp, self._sequence_parallel = tp, sequence_parallel
        self.placement: Placement = Replicate()

    def fit(self, batch: int, length: int) -> None:
        """Choose the placement for (batch, length) tokens, which can be cut (`tensor_problems`)."""
        dim = stream_dim(batch, length, self.tp) if self._sequence_parallel else None
        assert dim is not None or not self._sequence_parallel, f"({batch}, {length}) tokens can't be cut {self.tp} ways"
        self.placement = Replicate() if dim is None else Shard(dim)

    def at(self, where: Where) -> list[Placement]:
        """Translate a layout of the table to DTensor placements."""
        return [self.placement if isinstance(where, str) else where]


@dataclass(frozen=True)
class PlacedModule:
    """A module with a role. parent: the module that gives it, and knows the width of its heads."""

    name: str
    module: nn.Module
    role: TensorRole
    parent: nn.Module

    def heads(self, tp: int) -> Heads | None:
        """Return how ranks share the heads that it works on; None if ranks have whole heads of their own, or it has none."""
        if self.role not in ON_HEADS:
            return None
        head_dim, kv_heads = cast(Any, self.parent).head_dim, cast(Any, self.parent).kv_heads
        shared = self.role is not TensorRole.HEADS_NORM and kv_heads < tp
        if self.role is TensorRole.HEADS_VECTOR:
            return Heads(head_dim, None, HeadsWork.VECTOR)
        if self.role is TensorRole.KEY_VALUE:
            return Heads(head_dim, kv_heads, HeadsWork.PROJECT) if shared else None
        width = cast(Norm, self.module).config.width
        work = HeadsWork.NORM_EACH if width == head_dim else HeadsWork.NORM_ALL
        return Heads(head_dim, kv_heads if shared else None, work)

    def placement(self, parameter: nn.Parameter, tp: int) -> Placement:
        """Return how a parameter of it is cut over so many ranks."""
        heads = self.heads(tp)
        if heads is not None and (heads.shared is not None or heads.work is HeadsWork.NORM_EACH):
            return Replicate()
        return fitting(PLACES[self.role].weight, parameter)


def placed_modules(model: nn.Module) -> Iterator[PlacedModule]:
    """Find the modules that have a role, in the order of the model's modules."""
    for prefix, parent in model.named_modules():
        roles: Mapping[str, TensorRole] = getattr(parent, "tensor_roles", {})
        for child, module in parent.named_children():
            if child in roles:
                yield PlacedModule(f"{prefix}.{child}" if prefix else child, module, roles[child], parent)


def weight_owners(model: nn.Module) -> dict[str, PlacedModule]:
    """Find the modules whose weights a role places, by name: those that have one, and those inside of `TensorRole.TOKENS`."""
    found: dict[str, PlacedModule] = {}
    for each in placed_modules(model):
        found[each.name] = each
        if each.role is TensorRole.TOKENS:
            found |= {
                name: replace(each, name=name, module=module) for name, module in each.module.named_modules(prefix=each.name)
            }
    return found


def unplaced_modules(model: nn.Module) -> list[str]:
    """List the modules with parameters that have no role: those of a user's own class may have none."""
    placed = {each.module for each in weight_owners(model).values()}
    return [
        name or type(module).__name__
        for name, module in model.named_modules()
        if list(module.parameters(recurse=False)) and module not in placed
    ]


def apply_tensor_parallelism(
    model: Model, mesh: DeviceMesh, sequence_parallel: bool, elsewhere: Collection[nn.Module] = ()
) -> None:
    """Cut the model (or pipeline stage) over a 1-D mesh, in place. Parameters become DTensors; call it before FSDP.

    The model is usually on the meta device; real weights are taken to be the same on every rank. Shapes that don't
    divide are refused by `tensor_problems`, modules without a role by `unplaced_modules`.
    elsewhere: modules within those of `TensorRole.TOKENS` whose weights are divided over other ranks, and left as they are.
    """
    assert not any(isinstance(parameter, DTensor) for parameter in model.parameters()), "the model is cut already"
    # The embedding's output is a DTensor's local tensor. FSDP warns of views, for somebody might write into one; nobody does.
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module \(FSDPEmbedding\) returned a view tensor")
    stream = Stream(mesh.size(), sequence_parallel)
    cut: dict[nn.Parameter, nn.Parameter] = {}  # a tied head's weight is cut once, as the embedding's
    for each in list(placed_modules(model)):
        heads = each.heads(mesh.size())
        if heads is not None:
            for name, parameter in list(each.module.named_parameters(recurse=False)):
                each.module.register_parameter(name, distributed(parameter, mesh, each.placement(parameter, mesh.size())))
            work_on_heads(each.module, heads, mesh)
        elif each.role is TensorRole.TOKENS:
            work_on_tokens(each.module, mesh, elsewhere)
        else:
            _place(each.module, mesh, PLACES[each.role], stream, cut)
        if each.role is TensorRole.HEAD:
            each.parent.token_loss = VocabularyParallelLoss(mesh)  # pyright: ignore[reportArgumentType]
    model.forward = functools.partial(_forward, model.forward, stream, mesh.get_local_rank())


def fitting(placement: Placement, parameter: nn.Parameter) -> Placement:
    """Return the placement of a parameter of a module whose weight has this one: a bias has no input features to cut."""
    return Replicate() if isinstance(placement, Shard) and placement.dim >= parameter.dim() else placement


def _cut(module: nn.Module, mesh: DeviceMesh, placement: Placement, known: dict[nn.Parameter, nn.Parameter]) -> None:
    """Make a module's parameters DTensors; of one that is in `known`, the DTensor that it has become."""
    for key, parameter in list(module.named_parameters(recurse=False)):
        if parameter not in known:
            known[parameter] = distributed(parameter, mesh, fitting(placement, parameter))
        module.register_parameter(key, known[parameter])


def _place(
    module: nn.Module, mesh: DeviceMesh, place: TensorPlace, stream: Stream, known: dict[nn.Parameter, nn.Parameter]
) -> None:
    def enter(_module: nn.Module, inputs: tuple[torch.Tensor]) -> torch.Tensor:
        (x,) = inputs
        return x if isinstance(x, DTensor) else DTensor.from_local(x, mesh, stream.at(place.input_layout), run_check=False)

    def leave(_module: nn.Module, _inputs: Any, output: DTensor) -> torch.Tensor:
        # Waits for the collective: a tensor still on its way must not enter a compiled block.
        output = output.redistribute(placements=stream.at(place.output_layout))
        if not place.use_local_output:
            return output
        return output.to_local(grad_placements=None if place.gradient is None else [place.gradient])

    _cut(module, mesh, place.weight, known)
    module.register_forward_pre_hook(enter)
    module.register_forward_hook(leave)


def _forward(
    forward: Any,
    stream: Stream,
    rank: int,
    inputs: torch.Tensor,
    targets_BS: torch.Tensor | None = None,
    documents: Documents | None = None,
    positions_BS: torch.Tensor | None = None,
    **more: Any,
) -> torch.Tensor:
    """Run a cut model's `forward`, after setting where the stream lies.

    A stage without embedding sees a slice and must be given the positions of the whole sequences.
    """
    stream.fit(*(inputs.shape[:2] if positions_BS is None else positions_BS.shape))
    routing: Routing | None = more.get("routing")
    if routing is not None and isinstance(stream.placement, Shard):
        more["routing"] = routing.cut(stream.placement.dim, stream.tp, rank)
    return forward(inputs, targets_BS, documents, positions_BS, **more)
