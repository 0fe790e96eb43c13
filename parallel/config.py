"""Config of `parallel`: how the run is spread over processes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from ..config.keys import Side, key
from .deepspeed.settings import DeepSpeedConfig


@dataclass
class ParallelConfig:
    """Sizes of the mesh axes. Data parallelism takes what the others leave."""

    SIDE: ClassVar[Side] = Side.PLACEMENT

    engine: str = key("torch", "torch (FSDP2, DTensor, pipelining) or deepspeed")
    zero: int = key(3, "0 replicas; 1 shards optimizer state; 2 also gradients; 3 also weights")
    replicate: int = key(1, "hybrid sharding: number of groups that each hold a whole sharded copy (HSDP)")
    tp: int = key(1, "tensor-parallel size")
    sequence_parallel: bool = key(True, "with tp > 1: shard activations along the sequence between tensor-parallel regions")
    pp: int = key(1, "ranks that hold a pipeline's stages")
    schedule: str = key("1f1b", "pipeline schedule: gpipe, 1f1b, interleaved, zb, zbv or dualpipev")
    stages_per_rank: int | None = key(None, "pipeline stages of each rank; null: what the schedule needs")
    stage_layers: list[int] | None = key(None, "layers of each stage, written by hand; null: balanced by cost")
    cp: int = key(1, "context-parallel size")
    cp_kind: str = key("ring", "ring (zig-zag ring attention) or ulysses (all-to-all over heads)")
    copy_engines: bool = key(
        True, "GPUs of one host send weights and gradients that only move by their copy engines, where NCCL can (torch engine)"
    )
    timeout: float = key(600.0, "seconds before a collective that waits for a lost rank gives up")
    offload: str = key(
        "none",
        "where the optimizer's state lives between updates: none (with the weights), cpu, nvme (DeepSpeed only); the torch"
        " engine takes the sharded weights along",
    )
    offload_weights: str = key("none", "where DeepSpeed's ZeRO-3 keeps the weights' shards between uses: none, cpu or nvme")
    offload_path: str | None = key(None, "folder for nvme: a fast local disk")
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
