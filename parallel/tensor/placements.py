"""Tensor and sequence parallelism for `models/llama.py`: a table of placements, and its application through DTensor.

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
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

from ...config.problems import Problem
from ...models.llama import Llama
from ..config import ParallelConfig
from .vocabulary import VocabularyParallelLoss

STREAM: Literal["stream"] = "stream"  # where the residual stream lies; it depends on the batch
Where = Placement | Literal["stream"]


@dataclass(frozen=True)
class Place:
    """Where one module's weight, input and output lie on the tensor-parallel axis.

    weight  placement of its weight
    takes   placement of its input, for one that arrives as a plain tensor
    gives   placement its output is brought to
    plain   whether the output leaves as a plain local tensor
    """

    weight: Placement
    takes: Where
    gives: Where
    plain: bool = True


_NORM = Place(weight=Replicate(), takes=STREAM, gives=Replicate(), plain=False)
_COLUMN = Place(weight=Shard(0), takes=Replicate(), gives=Shard(-1))
_ROW = Place(weight=Shard(1), takes=Shard(-1), gives=STREAM)
LLAMA_PLACES = {
    "embed": Place(weight=Shard(0), takes=Replicate(), gives=STREAM),
    "layers.*.attention_norm": _NORM,
    "layers.*.attention.w[qkv]": _COLUMN,
    "layers.*.attention.wo": _ROW,
    "layers.*.ffn_norm": _NORM,
    "layers.*.ffn.w[13]": _COLUMN,
    "layers.*.ffn.w2": _ROW,
    "norm": _NORM,
    "head": Place(weight=Shard(0), takes=Replicate(), gives=Replicate()),
}
"""The table: pattern of a module's name in `Llama` → its place."""


def stream_dim(batch: int, length: int, tp: int) -> int | None:
    """The dim along which sequence parallelism cuts the residual stream of (batch, length) tokens: 0, 1, or None: it can't."""
    return 0 if batch % tp == 0 else 1 if length % tp == 0 else None


class Stream:
    """The present placement of the residual stream, set before every forward pass."""

    def __init__(self, tp: int, sequence_parallel: bool) -> None:
        self._tp, self._sequence_parallel = tp, sequence_parallel
        self.placement: Placement = Replicate()

    def fit(self, batch: int, length: int) -> None:
        """Choose the placement for (batch, length) tokens, which can be cut (`tensor_problems`)."""
        dim = stream_dim(batch, length, self._tp) if self._sequence_parallel else None
        assert dim is not None or not self._sequence_parallel, f"({batch}, {length}) tokens can't be cut {self._tp} ways"
        self.placement = Replicate() if dim is None else Shard(dim)

    def at(self, where: Where) -> list[Placement]:
        """A place of the table as DTensor placements."""
        return [self.placement if isinstance(where, str) else where]


class Shape(Protocol):
    """What must divide: the fields of `DecoderConfig` and of `Llama`."""

    heads: int
    kv_heads: int
    ffn_dim: int
    vocabulary: int | None


def tensor_problems(shape: Shape, parallel: ParallelConfig, seq_len: int) -> list[Problem]:
    """Everything that keeps this model from being cut `parallel.tp` ways."""
    tp = parallel.tp
    if tp == 1:
        return []
    problems: list[Problem] = []
    vocabulary = shape.vocabulary
    legal = [
        n
        for n in range(1, shape.heads + 1)
        if _cuts(shape.heads, shape.kv_heads, n) and shape.ffn_dim % n == 0 and not _idle(vocabulary, n)
    ]
    fix = f"use parallel.tp={' or '.join(map(str, legal))}"
    if shape.heads % tp:
        said = f"{shape.heads} attention heads (model.heads) can't be dealt to {tp} ranks"
        problems.append(Problem("parallel.tp", said, fix))
    elif not _cuts(shape.heads, shape.kv_heads, tp):
        said = f"{shape.kv_heads} key/value heads (model.kv_heads) neither divide by {tp} ranks nor divide them"
        problems.append(Problem("parallel.tp", said, fix))
    if shape.ffn_dim % tp:
        problems.append(Problem("parallel.tp", f"model.ffn_dim={shape.ffn_dim} can't be cut into {tp} equal parts", fix))
    if _idle(vocabulary, tp):
        problems.append(Problem("parallel.tp", f"a vocabulary of {vocabulary} leaves some of {tp} ranks without a row", fix))
    if parallel.sequence_parallel and (seq_len // parallel.cp) % tp:
        problems.append(
            Problem(
                "parallel.sequence_parallel",
                f"{seq_len // parallel.cp} positions per rank can't be cut into {tp} equal parts",
                f"use a data.seq_len divisible by {parallel.cp * tp}, or parallel.sequence_parallel=false",
            )
        )
    return problems


def _idle(vocabulary: int | None, tp: int) -> bool:
    """Whether a vocabulary cut into slices of equal length, but for the last, leaves a rank without a row."""
    return vocabulary is not None and -(-vocabulary // tp) * (tp - 1) >= vocabulary


def _cuts(heads: int, kv_heads: int, tp: int) -> bool:
    """Whether every rank's query heads need whole groups: its own key/value heads, or one that it shares with neighbours."""
    return heads % tp == 0 and (kv_heads % tp == 0 or tp % kv_heads == 0)


def apply_tensor_parallelism(model: Llama, mesh: DeviceMesh, sequence_parallel: bool) -> None:
    """Cut the model (or pipeline stage) over a 1-D mesh, in place. Parameters become DTensors; call it before FSDP.

    The model is usually on the meta device; real weights are taken to be the same on every rank. Shapes that don't
    divide are refused by `tensor_problems`.
    """
    assert not any(isinstance(parameter, DTensor) for parameter in model.parameters()), "the model is cut already"
    # The embedding's output is a DTensor's local tensor. FSDP warns of views, for somebody might write into one; nobody does.
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module \(FSDPEmbedding\) returned a view tensor")
    tied = model.tied and model.embed is not None and model.head is not None
    stream = Stream(mesh.size(), sequence_parallel)
    for name, module, place in _placed_modules(model):
        if name == "head" and tied:
            assert model.embed is not None and model.head is not None
            model.head.weight = model.embed.weight  # the embedding comes first: its DTensor is the head's too
        if name.endswith(("wk", "wv")) and model.kv_heads < mesh.size():
            _share_heads(module, mesh, model)
        else:
            _place(module, mesh, place, stream)
    if model.head is not None:
        model.token_loss = VocabularyParallelLoss(mesh)
    model.forward = functools.partial(_forward, model.forward, stream)


def unplaced_modules(model: nn.Module) -> list[str]:
    """Names of modules with parameters for which the table has no place: a class of the user's own may have some."""
    return [
        name
        for name, module in model.named_modules()
        if list(module.parameters(recurse=False)) and not any(fnmatch(name, pattern) for pattern in LLAMA_PLACES)
    ]


def _placed_modules(model: nn.Module) -> Iterator[tuple[str, Any, Place]]:
    for name, module in model.named_modules():
        found = [place for pattern, place in LLAMA_PLACES.items() if fnmatch(name, pattern)]
        assert len(found) <= 1, f"{name} matches several places"
        assert found or not list(module.parameters(recurse=False)), f"no place is known for {name} (`unplaced_modules`)"
        if found:
            yield name, module, found[0]


def _cut(module: nn.Module, mesh: DeviceMesh, placement: Placement) -> None:
    for key, parameter in list(module.named_parameters(recurse=False)):
        if not isinstance(parameter, DTensor):
            cut = distribute_tensor(parameter.detach(), mesh, [placement], src_data_rank=None)
            module.register_parameter(key, nn.Parameter(cut, requires_grad=parameter.requires_grad))


def _place(module: nn.Module, mesh: DeviceMesh, place: Place, stream: Stream) -> None:
    def enter(_module: nn.Module, inputs: tuple[torch.Tensor]) -> torch.Tensor:
        (x,) = inputs
        return x if isinstance(x, DTensor) else DTensor.from_local(x, mesh, stream.at(place.takes), run_check=False)

    def leave(_module: nn.Module, _inputs: Any, output: DTensor) -> torch.Tensor:
        # Waits for the collective: a tensor still on its way must not enter a compiled block.
        output = output.redistribute(placements=stream.at(place.gives))
        return output.to_local() if place.plain else output

    _cut(module, mesh, place.weight)
    module.register_forward_pre_hook(enter)
    module.register_forward_hook(leave)


def _share_heads(module: nn.Module, mesh: DeviceMesh, model: Llama) -> None:
    """A key/value projection with fewer heads than ranks: every rank keeps the whole weight and computes the head it needs.

    Each rank's gradient is zero outside that head's rows; declared partial, the sum over ranks is the whole gradient.
    """
    head = mesh.get_local_rank() * model.kv_heads // mesh.size()
    rows = slice(head * model.head_dim, (head + 1) * model.head_dim)

    def project(x_BSD: DTensor) -> torch.Tensor:
        weight: Any = module.weight
        own_ED = weight.to_local(grad_placements=[Partial()])[rows]
        return F.linear(x_BSD.to_local(grad_placements=[Partial()]), own_ED)

    _cut(module, mesh, Replicate())
    module.forward = project


def _forward(
    forward: Any,
    stream: Stream,
    inputs: torch.Tensor,
    targets_BS: torch.Tensor | None = None,
    documents_BS: torch.Tensor | None = None,
    positions_BS: torch.Tensor | None = None,
) -> torch.Tensor:
    """`Llama.forward` of a cut model: says where the stream lies first.

    A stage without embedding sees a slice and must be given the positions of the whole sequences.
    """
    stream.fit(*(inputs.shape[:2] if positions_BS is None else positions_BS.shape))
    return forward(inputs, targets_BS, documents_BS, positions_BS)
