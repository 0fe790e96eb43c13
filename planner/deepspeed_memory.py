"""Account for a rank's state under DeepSpeed, and where it lies: the torch engine's account of a layout, changed.

Read off DeepSpeed 0.19.8; activations and the loss are the same under both engines. n parameters on W ranks, u bytes an
element in the precision of the computation, on the GPU:

    stage  masters and optimizer   weights                gradient
    0      (the weights) + 8n      4n                     4n
    1      12n / W                 u n                    4n, and u n beside them in bf16 or 4n / W and a bucket in fp32
    2      12n / W                 u n                    4n / W and a bucket, as much again while it is updated
    3      12n / W                 u n / W and what is    4n / W and a bucket, a sub-group again while it is updated
                                   gathered at once

(8n and 12n are Adam's.) Small parameters stay gathered under stage 3; hpZ in groups of h keeps u n / h more from a step's
first pass to its update. With the optimizer's state on the host or disk:

    1, 2   host 16n / W and u n / W to cast the weights in. The gradient is added up on the GPU, whole under stage 1; under
           stage 2 in fp32 on the host, in 4n / W more.
    3      host 20n / W: the gradient is added up on the host, apart from the one that the optimizer reads. The GPU keeps
           the bucket only. Weights on the host: u n / W there.
    3      on disk 16n / W, host 4n / W and four buffers of the largest sub-group.

What is to be copied from and to the GPU is locked in memory, in buffers of a power of two of bytes (`offload.pinned`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ..parallel.config import ParallelConfig
from ..parallel.deepspeed.config import NVME_SUB_GROUP, as_dict
from .cost import RankCost
from .memory import Job
from .offload import OffloadAccount, pinned
from .parameters import Inventory, parameter_total

BUCKET = 500_000_000  # DeepSpeed's defaults, elements: reduce_bucket_size
SUB_GROUP = 1_000_000_000  # sub_group_size
LIVE = 1_000_000_000  # stage3_max_live_parameters
SWAP_BUFFERS = 4  # offload_optimizer.buffer_count
WEIGHTS_IN_HOST = 1_000_000_000  # offload_param.max_in_cpu
WEIGHT_BUFFERS = 5  # offload_param.buffer_count
WEIGHT_BUFFER = 100_000_000  # offload_param.buffer_size
PERSISTENT = 100_000  # stage3_param_persistence_threshold: what is no larger stays gathered


class _Sizes:
    """Elements of one rank's share, by DeepSpeed's groups."""

    def __init__(self, model: Inventory, ranks: int, limit: int) -> None:
        self.ranks = ranks
        self.parameters = [each.numel for each in model.parameters]
        self.largest = max(self.parameters)
        by_group: dict[tuple[bool, float], list[int]] = {}
        for each in model.parameters:
            by_group.setdefault((each.decays, each.lr_scale), []).append(-(-each.numel // ranks))
        self.groups = [sum(shares) for shares in by_group.values()]
        self.shard = sum(self.groups)
        self.sub_groups: list[int] = []
        for shares in by_group.values():
            filled = 0
            for share in shares:
                filled += share
                if filled >= limit:
                    self.sub_groups.append(filled)
                    filled = 0
            if filled:
                self.sub_groups.append(filled)


def deepspeed_cost(
    rank: RankCost, model: Inventory, parallel: ParallelConfig, job: Job, ranks: int
) -> tuple[RankCost, OffloadAccount]:
    """Estimate a rank's costs under DeepSpeed, on the GPU and off it.

    rank: the torch engine's for the same model without offloading, data-parallel.
    """
    unit, stage = 2 if job.precision == "bf16" else 4, parallel.zero
    keys: dict[str, Any] = as_dict(parallel.deepspeed.config).get("zero_optimization") or {}
    limit = int(keys.get("sub_group_size", NVME_SUB_GROUP if parallel.offload == "nvme" else SUB_GROUP))
    sizes = _Sizes(model, ranks, limit)
    whole, shard = parameter_total(model.parameters), sizes.shard
    bucket = _bucket(keys, stage, unit, whole)
    away, update, optimizer = OffloadAccount(), 0, rank.optimizer
    masters = 4 * shard if stage else 0  # stage 0 updates the weights themselves
    if stage == 0:
        gradients = 4 * whole
    elif parallel.offload != "none":
        adding = {1: 4 * whole + (4 * shard if unit == 2 else 0), 2: 4 * shard, 3: 0}[stage]
        gradients = bucket + adding + (unit * sizes.largest if stage < 3 else 0)
        away = _optimizer_away(parallel, sizes, masters + (optimizer or 0), unit, job.micro_batches, keys)
        masters, optimizer = 0, None if optimizer is None else 0
    elif stage == 1:
        gradients = 4 * whole + (unit * whole if unit == 2 else 4 * shard + bucket)
    else:
        gradients = 4 * shard + bucket
        update = gradients + 4 * min(shard, max(sizes.sub_groups if stage == 3 else sizes.groups))
    weights, gathered = masters, 0
    if stage == 0:
        weights = 4 * whole
    elif stage < 3:
        gathered = unit * whole
    else:
        if parallel.offload_weights == "none":
            weights += unit * shard
        else:
            away = _weights_away(away, parallel, sizes, unit, job.micro_batches, keys)
        if ranks > 1 or parallel.offload_weights != "none":
            live = int(keys.get("stage3_max_live_parameters", LIVE))
            gathered = min(unit * whole, max(rank.gathered, unit * live) + unit * _persistent(model, keys))
        second = unit * -(-whole // near) if (near := int(keys.get("zero_hpz_partition_size", 1))) > 1 else 0
        if parallel.offload_weights == "none":
            weights += second
        else:
            away = replace(away, host=away.host + second)
    state = {"weights": weights, "gathered": gathered, "gradients": gradients, "held": gradients, "optimizer": optimizer}
    return replace(rank, **state, update=update), away


def _bucket(keys: dict[str, Any], stage: int, unit: int, whole: int) -> int:
    """Count the bytes of DeepSpeed's reduction buckets."""
    if not keys.get("contiguous_gradients", True):
        return 0
    elements = int(keys.get("reduce_bucket_size", BUCKET))
    turns = 2 if stage < 3 and keys.get("overlap_comm") else 1
    widened = 4 * min(elements, whole) if stage == 2 and unit == 2 else 0
    return (unit if stage == 2 else 4) * elements * turns + widened


def _persistent(model: Inventory, keys: dict[str, Any]) -> int:
    """Count the elements of the parameters that stage 3 keeps gathered."""
    largest = int(keys.get("stage3_param_persistence_threshold", PERSISTENT))
    room = int(keys.get("stage3_model_persistence_threshold", sys.maxsize))
    kept = 0
    for each in model.parameters:
        if each.numel <= largest and kept + each.numel <= room:
            kept += each.numel
    return kept


def _locked(keys: dict[str, Any], place: str) -> Callable[[int], int]:
    """Return the function that gives the host bytes of a buffer of a size: pinned, or as it is."""
    return pinned if (keys.get(place) or {}).get("pin_memory", True) else lambda size: size


def _optimizer_away(
    parallel: ParallelConfig, sizes: _Sizes, state: int, unit: int, micro_batches: int, keys: dict[str, Any]
) -> OffloadAccount:
    """state: bytes of masters and moments."""
    locked = _locked(keys, "offload_optimizer")
    gradient = 4 * sizes.shard
    back = unit * sizes.shard if parallel.offload_weights == "none" else 0  # the updated weights
    if parallel.zero < 3:
        masters = 4 * sizes.shard
        host = sum(2 * locked(4 * size) + locked(unit * size) for size in sizes.groups) + locked(unit * sizes.largest)
        if unit == 4 and parallel.zero == 2:  # added up on the host, parameter by parameter
            host += sum(locked(4 * size) for size in sizes.parameters) // sizes.ranks
            return OffloadAccount(state - masters + host, 0, gradient * (micro_batches + 1), gradient * micro_batches + back)
        return OffloadAccount(host=state - masters + host, to_host=gradient, from_host=back)
    moved = {"to_host": gradient * (micro_batches + 1), "from_host": gradient * micro_batches + back}
    if parallel.offload == "cpu":
        return OffloadAccount(host=state + locked(gradient) + sum(locked(4 * size) for size in sizes.sub_groups), **moved)
    buffers = int((keys.get("offload_optimizer") or {}).get("buffer_count", SWAP_BUFFERS)) * 4 * max(sizes.sub_groups)
    traffic = state + gradient
    return OffloadAccount(locked(gradient) + buffers, traffic, disk_read=traffic, disk_written=traffic, **moved)


def _weights_away(
    away: OffloadAccount, parallel: ParallelConfig, sizes: _Sizes, unit: int, micro_batches: int, keys: dict[str, Any]
) -> OffloadAccount:
    """A forward and a backward pass each fetch the weights."""
    total = unit * sizes.shard
    passes = 2 * micro_batches * total
    locked = _locked(keys, "offload_param")
    if parallel.offload_weights == "cpu":
        kept = sum(locked(unit * size) for size in sizes.groups)
        return replace(away, host=away.host + kept, from_host=away.from_host + passes)
    there = keys.get("offload_param") or {}
    buffers = int(there.get("buffer_count", WEIGHT_BUFFERS)) * int(there.get("buffer_size", WEIGHT_BUFFER))
    in_host = min(total, unit * int(there.get("max_in_cpu", WEIGHTS_IN_HOST)))
    on_disk = total - in_host
    return replace(
        away,
        host=away.host + locked(in_host) + unit * buffers,
        disk=away.disk + on_disk,
        from_host=away.from_host + passes,
        disk_read=away.disk_read + 2 * micro_batches * on_disk,
        disk_written=away.disk_written + on_disk,
    )
