"""Compute what a layout holds, by arithmetic: parts of parameters, and the optimizer's state for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.tensor import Shard

from ..models.costs import ForwardPass
from ..models.protocol import Model
from ..optim.optimizers.parameters import FusedStep, NamedParameter, Unsharded
from ..parallel.config import ParallelConfig
from ..parallel.engine import OptimizerFactory
from ..parallel.layout import Layout
from ..parallel.tensor.placements import weight_owners


@dataclass(frozen=True)
class Job:
    """The work to be planned, besides the model and the layout.

    seq_len, micro    positions per sample, samples per micro-batch
    micro_batches     per rank and step
    precision         bf16, fp32 or fp64
    policies          of each block: none, selective, full or offload; compiled: whether blocks are compiled
    fused             whether SwiGLU is computed inside the products around it (`kernels/swiglu.py`)
    """

    seq_len: int
    micro: int
    micro_batches: int
    precision: str
    policies: list[str]
    compiled: bool
    fused: bool = False

    def forward_pass(self, parallel: ParallelConfig) -> ForwardPass:
        """Describe a rank's forward pass of one micro-batch."""
        return ForwardPass(
            tokens=self.micro * self.seq_len // parallel.cp,
            precision=self.precision,
            tp=parallel.tp,
            sequence_parallel=parallel.sequence_parallel,
            compiled=self.compiled,
            fused_swiglu=self.fused,
        )


@dataclass(frozen=True)
class WeightShard:
    """One parameter of a stage, for the rank with the largest shard.

    group   the module whose weights are gathered together
    whole   elements after tensor parallelism, as the computation uses them
    padded  elements that storage is kept for; shape: of the shard itself
    """

    name: str
    group: str
    whole: int
    padded: int
    shape: tuple[int, ...]


def pieces(stage: Model, layout: Layout) -> list[WeightShard]:
    """Cut a stage as FSDP2 over tensor-parallel parameters does: along dim 0, into equal chunks except the last."""
    ways = layout.weight_ranks
    placed = weight_owners(stage)
    found: list[WeightShard] = []
    for name, parameter in stage.named_parameters():
        shape = list(parameter.shape)
        module = name.rpartition(".")[0]
        placement = placed[module].placement(parameter, layout.tp)
        if isinstance(placement, Shard):
            shape[placement.dim] = -(-shape[placement.dim] // layout.tp)
        rows = -(-shape[0] // ways)
        row = torch.Size(shape[1:]).numel()
        group = ".".join(name.split(".")[:2]) if name.startswith("layers.") else name.split(".")[0]
        found.append(WeightShard(name, group, shape[0] * row, rows * row, (rows, *shape[1:])))
    return found


def optimizer_bytes(
    make: OptimizerFactory, own: Sequence[WeightShard], model: Model, dtype: torch.dtype
) -> tuple[int | None, bool]:
    """Count the bytes that an optimizer keeps of these shards; tell if it takes compute-dtype gradients (`FusedStep`).

    Found by a step on tensors without storage; (None, False) where it can't take one.
    """
    try:
        with torch.device("meta"):
            tensors = [nn.Parameter(torch.empty(piece.shape, dtype=dtype)) for piece in own]
        parameters = [
            NamedParameter(piece.name, tensor, piece.shape, model.decays(piece.name), model.lr_scale(piece.name))
            for piece, tensor in zip(own, tensors, strict=True)
        ]
        for parameter in parameters:
            parameter.tensor.grad = torch.empty_like(parameter.tensor)
        # Not under the meta device: counters, which an optimizer makes without naming a device, are numbers that it reads.
        optimizer = make(parameters, Unsharded())
        optimizer.step()
    except (RuntimeError, NotImplementedError):  # an optimizer whose step asks for numbers
        return None, False
    values = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    size = sum(value.numel() * value.element_size() for value in values if value.dim())
    return size, isinstance(optimizer, FusedStep)
