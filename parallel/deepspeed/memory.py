"""What a rank's state takes under DeepSpeed, and where: the torch engine's account of a layout, changed to DeepSpeed's.

Read off DeepSpeed 0.19.8; activations and the loss are the same under both engines. n parameters on W ranks, u bytes an
element in the precision of the computation, on the GPU:

    stage  masters and optimizer   weights                gradient
    0      (the weights) + 8n      4n                     4n
    1      12n / W                 u n                    4n, and u n beside them in bf16
    2      12n / W                 u n                    4n / W and a bucket, as much again while it is updated
    3      12n / W                 u n / W and what is    4n / W and a bucket, a sub-group again while it is updated
                                   gathered at once

(8n and 12n are Adam's.) With the optimizer's state on the host or disk:

    1, 2   host 16n / W and u n / W to cast the weights in. The gradient is added up on the GPU.
    3      host 20n / W: the gradient is added up on the host, apart from the one that the optimizer reads. The GPU keeps
           the bucket only. Weights on the host: u n / W there.
    3      on disk 16n / W, host 4n / W and four buffers of the largest sub-group.

What is to be copied from and to the GPU is locked in memory, in buffers of a power of two of bytes (`offload.pinned`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ...config.parallel import ParallelConfig
from ...models.llama import Llama
from ..cost import RankCost
from ..memory import Job
from ..offload import OffloadAccount, pinned
from .config import NVME_SUB_GROUP, plain

BUCKET = 500_000_000  # DeepSpeed's defaults, elements: reduce_bucket_size
SUB_GROUP = 1_000_000_000  # sub_group_size
LIVE = 1_000_000_000  # stage3_max_live_parameters
SWAP_BUFFERS = 4  # offload_optimizer.buffer_count
WEIGHTS_IN_HOST = 1_000_000_000  # offload_param.max_in_cpu
WEIGHT_BUFFERS = 5 * 100_000_000  # offload_param.buffer_count times buffer_size


class _Sizes:
    """Elements of one rank's share, by DeepSpeed's groups."""

    def __init__(self, model: Llama, ranks: int, limit: int) -> None:
        self.largest = max(parameter.numel() for parameter in model.parameters())
        by_group: dict[tuple[bool, float], list[int]] = {}
        for name, parameter in model.named_parameters():
            share = -(-parameter.numel() // ranks)
            by_group.setdefault((model.decays(name), model.lr_scale(name)), []).append(share)
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
    rank: RankCost, model: Llama, parallel: ParallelConfig, job: Job, ranks: int
) -> tuple[RankCost, OffloadAccount]:
    """The account under DeepSpeed, on the GPU and away from it.

    rank: the torch engine's for the same model without offloading, data-parallel.
    """
    unit, stage = 2 if job.precision == "bf16" else 4, parallel.zero
    keys: dict[str, Any] = plain(parallel.deepspeed.config).get("zero_optimization") or {}
    limit = int(keys.get("sub_group_size", NVME_SUB_GROUP if parallel.offload == "nvme" else SUB_GROUP))
    bucket = 4 * int(keys.get("reduce_bucket_size", BUCKET))
    sizes = _Sizes(model, ranks, limit)
    whole, shard = sum(parameter.numel() for parameter in model.parameters()), sizes.shard
    away = OffloadAccount()
    weights, own, working = unit * (shard if stage == 3 else whole), 4 * shard if stage else 0, rank.working
    if stage == 3 and unit == 4 and parallel.offload == "none":
        own = 0  # under ZeRO-3 in fp32 the weights are their own masters
    gathered = 0
    if stage == 3 and (ranks > 1 or parallel.offload_weights != "none"):
        live = int(keys.get("stage3_max_live_parameters", LIVE))
        gathered = max(rank.gathered, unit * min(whole, live))
    optimizer = rank.optimizer
    if stage == 0:
        gradients = 4 * whole
    elif parallel.offload != "none":
        gradients = bucket + (4 * shard + unit * sizes.largest if stage < 3 else 0)
        away = _optimizer_away(parallel, sizes, own + (optimizer or 0), unit, job.micro_batches, keys)
        own, optimizer = 0, None if optimizer is None else 0
    elif stage == 1:
        gradients = 4 * whole + (unit * whole if unit == 2 else 4 * shard)
    else:
        gradients = 4 * shard + bucket
        # The update comes when activations are gone.
        working = max(working, 4 * min(shard, max(sizes.sub_groups if stage == 3 else sizes.groups)) - rank.activations)
    if parallel.offload_weights != "none":
        away = _weights_away(away, parallel, sizes, unit, job.micro_batches, keys)
        weights = 0
    state = {"weights": own, "gathered": weights + gathered, "gradients": gradients, "held": gradients, "optimizer": optimizer}
    return replace(rank, **state, working=working), away


def _optimizer_away(
    parallel: ParallelConfig, sizes: _Sizes, state: int, unit: int, micro_batches: int, keys: dict[str, Any]
) -> OffloadAccount:
    """state: bytes of masters and moments."""
    gradient = 4 * sizes.shard
    back = unit * sizes.shard if parallel.offload_weights == "none" else 0  # the updated weights
    if parallel.zero < 3:
        masters = 4 * sizes.shard
        locked = sum(2 * pinned(4 * size) + pinned(unit * size) for size in sizes.groups) + pinned(unit * sizes.largest)
        return OffloadAccount(host=state - masters + locked, to_host=gradient, from_host=back)
    moved = {"to_host": gradient * (micro_batches + 1), "from_host": gradient * micro_batches + back}
    if parallel.offload == "cpu":
        locked = pinned(gradient) + sum(pinned(4 * size) for size in sizes.sub_groups)
        return OffloadAccount(host=state + locked, **moved)
    buffers = int((keys.get("offload_optimizer") or {}).get("buffer_count", SWAP_BUFFERS)) * 4 * max(sizes.sub_groups)
    traffic = state + gradient
    return OffloadAccount(pinned(gradient) + buffers, traffic, disk_read=traffic, disk_written=traffic, **moved)


def _weights_away(
    away: OffloadAccount, parallel: ParallelConfig, sizes: _Sizes, unit: int, micro_batches: int, keys: dict[str, Any]
) -> OffloadAccount:
    """A forward and a backward pass each fetch the weights."""
    total = unit * sizes.shard
    passes = 2 * micro_batches * total
    if parallel.offload_weights == "cpu":
        kept = sum(pinned(unit * size) for size in sizes.groups)
        return replace(away, host=away.host + kept, from_host=away.from_host + passes)
    there = keys.get("offload_param") or {}
    in_host = min(total, unit * int(there.get("max_in_cpu", WEIGHTS_IN_HOST)))
    on_disk = total - in_host
    return replace(
        away,
        host=away.host + pinned(in_host) + unit * WEIGHT_BUFFERS,
        disk=away.disk + on_disk,
        from_host=away.from_host + passes,
        disk_read=away.disk_read + 2 * micro_batches * on_disk,
        disk_written=away.disk_written + on_disk,
    )
