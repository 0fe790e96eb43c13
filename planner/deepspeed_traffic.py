"""Count what a step of DeepSpeed 0.19.8 reads, writes and sends for weights, gradients and update (`planner/traffic.py`)."""

from __future__ import annotations

from typing import Any

from ..config.precision import PRECISIONS
from ..parallel.config import ParallelConfig
from ..parallel.deepspeed.config import as_dict
from ..parallel.layout import Layout
from .cost import RankCost
from .memory import Job
from .traffic import Traffic

UPDATE = 46
"""Bytes per parameter of the update, in passes of their own: the gradient read for its norm (4) and scaled (8), torch's fused
AdamW (28), the weight cast to bf16 (6)."""


def deepspeed_moved(rank: RankCost, parallel: ParallelConfig, layout: Layout, job: Job) -> Traffic:
    """For M micro-batches on W ranks, whole being all parameters and own a rank's share; gradients always travel in fp32.

    0, 1    M times gradients are added up whole; once they are copied into buckets, summed by an all-reduce, and copied back
    2       M times they are copied into buckets, widened, summed by an all-reduce, and a rank's share is added up
    3       M times they are widened into buckets, scattered, and a rank's share is added up; 2 M times shards in the precision
            of the computation are copied into one buffer, gathered, and copied out of it. With hpZ every second time they
            come from the group next door. With quantised weights they travel in a byte each (that they are quantised within
            the GPU is not counted)
    1, 2    new weights are gathered once
    """
    precision, ranks, many = PRECISIONS[job.precision], layout.world_size, job.micro_batches
    unit, exact = precision.bytes, precision.accum_bytes
    own, whole = rank.elements, rank.whole(layout)
    away = (ranks - 1) / ranks
    summed = 2 * exact * whole * away
    if layout.zero < 2:
        within = many * (unit + 2 * exact) * whole + (4 * exact * whole if ranks > 1 else 0)
        between = summed + (unit * whole * away if layout.zero else 0)
    elif layout.zero == 2:
        within = many * ((2 * unit + (unit + exact if unit < exact else 0)) * whole + 3 * exact * own)
        between = many * summed + unit * whole * away
    else:
        keys: dict[str, Any] = as_dict(parallel.deepspeed.config).get("zero_optimization") or {}
        near = int(keys.get("zero_hpz_partition_size", 1))
        sent = 1 if keys.get("zero_quantized_weights") else unit
        again = (near - 1) / near if near > 1 else away
        gathering = 2 * unit * (whole + own) if ranks > 1 else 0
        within = many * (2 * gathering + (unit + exact) * whole + 3 * exact * own)
        between = many * (sent * whole * (away + again) + exact * whole * away)
    return Traffic(within, between, UPDATE * own)
