"""What a layout holds, by arithmetic: parts of parameters, what an optimizer keeps of them, what blocks keep and compute."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.tensor import Shard

from ..kernels import swiglu
from ..kernels.loss import CHUNK
from ..models.llama import Llama
from ..optim.optimizers.parameters import NamedParameter, OnePass, Unsharded
from .activation import MIXED, mixed_policies
from .config import ParallelConfig
from .engine import EngineSettings, OptimizerFactory
from .layout import Layout
from .pipeline.stages import splits_backward
from .tensor.placements import LLAMA_PLACES

BYTES = {"bf16": 2, "fp32": 4, "fp64": 8}
"""Of an element that is computed with, by precision."""

EXACT = {"bf16": 4, "fp32": 4, "fp64": 8}
"""Of an element that is updated or summed."""


@dataclass(frozen=True)
class Job:
    """What is to be done, besides the model and the layout.

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


@dataclass(frozen=True)
class Piece:
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


def pieces(stage: nn.Module, layout: Layout) -> list[Piece]:
    """How FSDP2 over tensor-parallel parameters cuts a stage: along dim 0, into chunks of equal size but for the last."""
    ways = layout.weight_ranks
    found: list[Piece] = []
    for name, parameter in stage.named_parameters():
        shape = list(parameter.shape)
        module = name.rpartition(".")[0]
        place = next(place for pattern, place in LLAMA_PLACES.items() if fnmatch.fnmatch(module, pattern))
        few_heads = module.endswith((".wk", ".wv")) and isinstance(stage, Llama) and stage.kv_heads < layout.tp
        if isinstance(place.weight, Shard) and not few_heads:
            shape[place.weight.dim] = -(-shape[place.weight.dim] // layout.tp)
        rows = -(-shape[0] // ways)
        row = torch.Size(shape[1:]).numel()
        group = ".".join(name.split(".")[:2]) if name.startswith("layers.") else name.split(".")[0]
        found.append(Piece(name, group, shape[0] * row, rows * row, (rows, *shape[1:])))
    return found


def optimizer_bytes(make: OptimizerFactory, own: Sequence[Piece], model: Llama, dtype: torch.dtype) -> tuple[int | None, bool]:
    """What an optimizer keeps of these shards, and whether it takes gradients in the dtype of the compute (`OnePass`).

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
    return size, isinstance(optimizer, OnePass)


def why_swiglu_is_plain(
    model: Llama, parallel: ParallelConfig, settings: EngineSettings, policies: Sequence[str]
) -> str | None:
    """Why no block computes SwiGLU inside the products around it (`kernels/swiglu.py`), on whatever GPU; None if some may."""
    if parallel.engine != "torch":
        return "DeepSpeed runs the blocks as they are"
    if parallel.tp > 1:
        return "parallel.tp cuts its products"
    if splits_backward(parallel):  # before 2.13 torch can't run the second half through an operator of several gradients
        return f"parallel.schedule={parallel.schedule} cuts its backward pass"
    if settings.precision != "bf16":
        return "its kernels are bf16's"
    if settings.float8 != "none":
        return "trainer.float8 computes its products"
    if all(policy == "selective" for policy in policies):
        return "trainer.activation=selective keeps one of them"
    if not swiglu.widths_fit(model.dim, model.ffn_dim):
        return f"its kernels don't take widths of {model.dim} and {model.ffn_dim}"
    return None


def block_bytes(model: Llama, job: Job, parallel: ParallelConfig, policy: str) -> int:
    """What one block keeps of one micro-batch for its backward pass, under an activation policy.

    Counted tensor by tensor as in arXiv 2205.05198, for RMSNorm, rotary positions, fused attention and SwiGLU. With D the
    width, K that of all key heads, F the feed-forward's, t and s the tensor-parallel cuts of features and of the stream:
    norms' inputs 2 D/s and outputs 2 D; q, k, v and attention's output (2 D + 2 K)/t; SwiGLU 4 F/t: gate, up, silu(gate) and
    the product. A compiled block computes only silu again: the compiler keeps every factor of a matrix product; SwiGLU inside
    the products keeps neither. Norms and softmax keep a few fp32 numbers per position besides.
    Selectively: the block's input, q, k, v, attention's output and its projection, and one of SwiGLU's two factors.
    """
    tokens = job.micro * job.seq_len // parallel.cp
    unit, exact = BYTES[job.precision], EXACT[job.precision]
    tp = parallel.tp
    stream = model.dim / (tp if parallel.sequence_parallel else 1)
    kv_dim = model.kv_heads * model.head_dim
    heads = (2 * model.dim + 2 * max(kv_dim, model.head_dim * tp)) / tp
    statistics = exact * (model.heads / tp + 2 / (tp if parallel.sequence_parallel else 1))
    if policy == "full":
        per_token = unit * stream
    elif policy == "offload":
        per_token = 0.0
    elif policy == "selective":
        per_token = unit * (stream + heads + model.dim + model.ffn_dim / tp) + exact * model.heads / tp
    else:
        wide = 2 if job.fused else 3 if job.compiled else 4
        per_token = unit * (2 * stream + 2 * model.dim + heads + wide * model.ffn_dim / tp) + statistics
    return round(tokens * per_token)


def layer_flops(model: Llama, seq_len: int) -> float:
    """Forward FLOPs of one block per token: 2 per matrix parameter, and the half of attention that causality leaves."""
    kv_dim = model.kv_heads * model.head_dim
    matrices = 2 * model.dim * model.dim + 2 * model.dim * kv_dim + 3 * model.dim * model.ffn_dim
    return 2.0 * matrices + 2.0 * model.dim * seq_len


def recomputed_flops(model: Llama, policy: str, seq_len: int) -> float:
    """FLOPs per token that a block's backward pass spends on computing activations again."""
    return {"full": layer_flops(model, seq_len), "selective": 2.0 * model.dim * model.ffn_dim}.get(policy, 0.0)


def block_policies(model: Llama, parallel: ParallelConfig, settings: EngineSettings) -> list[str]:
    """The activation policy of every block: `trainer.activation`, or what `trainer.activation_budget` leaves to choose.

    Raises ValueError for a budget that no choice keeps to.
    """
    if settings.activation_budget is None:
        return [settings.activation] * model.depth
    halves = splits_backward(parallel)
    # What blocks keep is in proportion to their tokens, so any number of them will do.
    job = Job(1024 * parallel.cp, 1, 1, settings.precision, [], settings.compile)
    kept = {policy: block_bytes(model, job, parallel, policy) for policy in MIXED if not (halves and policy == "selective")}
    again = {policy: recomputed_flops(model, policy, 0) for policy in kept}
    return mixed_policies(model.depth, settings.activation_budget, kept, again)


def loss_bytes(model: Llama, job: Job, parallel: ParallelConfig) -> int:
    """What final norm, head and loss hold of one micro-batch: its states and their gradient, the head's, a chunk of logits."""
    tokens = job.micro * job.seq_len // parallel.cp
    unit, exact = BYTES[job.precision], EXACT[job.precision]
    rows = -(-model.vocabulary // parallel.tp)
    states = tokens * model.dim * unit * 3
    # The head's gradient is added up in fp32 while a chunk's logits live, and cast when they are gone.
    return states + rows * model.dim * exact + max(min(CHUNK, tokens), model.dim) * rows * unit
