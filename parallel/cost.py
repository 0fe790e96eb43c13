"""What a layout costs each rank, by arithmetic alone: FLOPs of each stage, and bytes by what holds them."""

from __future__ import annotations

from ..config.parallel import ParallelConfig
from ..models.llama import Llama
from .stages import StagePlan

BALANCE = 165.0
"""FLOPs that an accelerator computes while it moves one byte (H200: 790 TFLOP/s measured, 4.8 TB/s), for lookups."""


def layer_flops(model: Llama, seq_len: int) -> float:
    """Forward FLOPs of one block per token: 2 per matrix parameter, and the half of attention that causality leaves."""
    kv_dim = model.kv_heads * model.head_dim
    matrices = 2 * model.dim * model.dim + 2 * model.dim * kv_dim + 3 * model.dim * model.ffn_dim
    return 2.0 * matrices + 2.0 * model.dim * seq_len


def head_flops(model: Llama) -> float:
    """Forward FLOPs of the head per token."""
    return 2.0 * model.dim * model.vocabulary


def embedding_flops(model: Llama) -> float:
    """A lookup computes nothing; the FLOPs that fit in the time of moving its row, 2 bytes an element, in and out."""
    return 4.0 * model.dim * BALANCE


def balanced_stages(model: Llama, parallel: ParallelConfig, seq_len: int, activation: str = "none") -> StagePlan:
    """Layers per stage by `parallel.stage_layers`, or so that the slowest stage is as fast as can be.

    A backward pass costs two forward passes, and a third where the layer's activations are computed again.
    """
    passes = 4.0 if activation == "full" else 3.0
    costs = [passes * layer_flops(model, seq_len)] * model.depth
    return StagePlan.of(parallel, costs, first=3.0 * embedding_flops(model), last=3.0 * head_flops(model))
