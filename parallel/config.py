"""Config of `parallel`: how the run is spread over processes."""

from __future__ import annotations

from dataclasses import dataclass, field

from .deepspeed.settings import DeepSpeedConfig


@dataclass
class ParallelConfig:
    """Sizes of the mesh axes. Data parallelism takes what the others leave.

    engine             "torch" (FSDP2, DTensor, pipelining) or "deepspeed"
    zero               0 replicas; 1 shards optimizer state; 2 also gradients; 3 also weights
    replicate          hybrid sharding: number of groups that each hold a whole sharded copy (HSDP)
    tp                 tensor-parallel size
    sequence_parallel  with tp > 1: shard activations between the tensor-parallel regions along the sequence
    pp                 pipeline stages' ranks
    schedule           pipeline schedule: gpipe, 1f1b, interleaved, zb, zbv, dualpipev
    stages_per_rank    pipeline stages (model chunks) held by each rank; null: what the schedule needs
    stage_layers       layers of each stage, written by hand; null: balanced by cost
    cp                 context-parallel size
    cp_kind            "ring" (zig-zag ring attention) or "ulysses" (all-to-all over heads)
    copy_engines       weights and gradients that only move, between GPUs of one host, are sent by their copy engines where NCCL
                       can: multiprocessors are left to the products (torch engine)
    timeout            seconds before a collective that waits for a lost rank gives up
    offload            where the optimizer's state lives between updates: none (with the weights), cpu, nvme (DeepSpeed only);
                       the torch engine takes the sharded weights along
    offload_weights    where DeepSpeed's ZeRO-3 keeps the weights' shards between uses: none, cpu, nvme
    offload_path       folder for nvme: a fast local disk
    deepspeed          settings of the DeepSpeed engine alone
    """

    engine: str = "torch"
    zero: int = 3
    replicate: int = 1
    tp: int = 1
    sequence_parallel: bool = True
    pp: int = 1
    schedule: str = "1f1b"
    stages_per_rank: int | None = None
    stage_layers: list[int] | None = None
    cp: int = 1
    cp_kind: str = "ring"
    copy_engines: bool = True
    timeout: float = 600.0
    offload: str = "none"
    offload_weights: str = "none"
    offload_path: str | None = None
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
