"""What a rank's state takes under DeepSpeed, and where: the torch engine's account of a layout, changed to DeepSpeed's.

Read off DeepSpeed 0.19.8; activations and the loss are the same under both engines. n parameters on W ranks, u bytes an
element in the precision of the computation:

    stage  masters and optimizer   weights                gradient
    0      (the weights) + 8n      4n                     4n
    1      12n / W                 u n                    4n, and u n beside them in bf16
    2      12n / W                 u n                    4n / W and a bucket
    3      12n / W                 u n / W and what is    4n / W and a bucket
                                   gathered at once

(8n and 12n are Adam's.) Offloading moves the first column, with a copy of the fp32 gradient's shard, to the host or disk.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ...config.parallel import ParallelConfig
from ..cost import RankCost
from .config import plain

BUCKET = 500_000_000  # DeepSpeed's default reduce_bucket_size, elements


@dataclass(frozen=True)
class OffloadAccount:
    """Bytes of a rank's state away from its GPU, and bytes that it moves in a step.

    passes  bytes fetched from the host or disk for the weights of one forward and backward pass of a micro-batch, each
    """

    host: int = 0
    disk: int = 0
    to_host: int = 0
    from_host: int = 0
    disk_read: int = 0
    disk_written: int = 0
    passes: int = 0


def deepspeed_cost(
    rank: RankCost, parameters: int, parallel: ParallelConfig, precision: str, ranks: int
) -> tuple[RankCost, OffloadAccount]:
    """The account under DeepSpeed, on the GPU and away from it.

    rank: the torch engine's, data-parallel; parameters: of the whole model.
    """
    unit, n, stage = 2 if precision == "bf16" else 4, parameters, parallel.zero
    shard = -(-n // ranks)
    zero = plain(parallel.deepspeed.config).get("zero_optimization") or {}
    bucket = 4 * min(n, int(zero.get("reduce_bucket_size", BUCKET)))
    own = 4 * shard if stage else 0  # masters; without ZeRO and under ZeRO-3 in fp32 the weights are their own masters
    if stage == 3 and unit == 4 and parallel.offload == "none":
        own = 0
    weights = unit * (shard if stage == 3 else n)
    gathered = rank.gathered if stage == 3 and (ranks > 1 or parallel.offload_weights != "none") else 0
    if stage == 0:
        gradients = 4 * n
    elif stage == 1:
        gradients = 4 * n + (unit * n if unit == 2 else 4 * shard)
    else:
        gradients = 4 * shard + bucket
    optimizer = rank.optimizer
    away = OffloadAccount()
    if parallel.offload != "none":
        state = own + (optimizer or 0)
        away = OffloadAccount(
            host=state + 4 * shard if parallel.offload == "cpu" else 0,
            disk=state + 4 * shard if parallel.offload == "nvme" else 0,
            to_host=4 * shard,
            from_host=unit * shard,
            disk_read=state + 4 * shard if parallel.offload == "nvme" else 0,
            disk_written=state + 4 * shard if parallel.offload == "nvme" else 0,
        )
        own, optimizer = 0, 0 if optimizer is not None else None
    if parallel.offload_weights != "none":
        on_host = parallel.offload_weights == "cpu"
        away = replace(
            away,
            host=away.host + (weights if on_host else 0),
            disk=away.disk + (0 if on_host else weights),
            disk_written=away.disk_written + (0 if on_host else weights),
            passes=weights,
        )
        weights = 0
    return replace(rank, weights=own, gathered=weights + gathered, gradients=gradients, optimizer=optimizer), away


def describe(away: OffloadAccount, micro_batches: int) -> list[str]:
    """Sentences for a plan: where the rest is, and what a step moves. Empty when nothing is offloaded."""
    if away == OffloadAccount():
        return []

    def gib(count: int) -> str:
        return f"{count / 2**30:.3g} GiB"

    places = [f"{gib(count)} {where}" for count, where in ((away.host, "in host memory"), (away.disk, "on disk")) if count]
    lines = [f"each process keeps {' and '.join(places)}, beside the table's figures, which are the GPU's"]
    moved = [f"{gib(away.to_host)} of gradient to the host, {gib(away.from_host)} of weights back"]
    if away.disk_read:
        moved.append(f"{gib(away.disk_read)} read from and {gib(away.disk_written)} written to disk")
    if away.passes:
        moved.append(f"{gib(2 * micro_batches * away.passes)} of weights fetched for {micro_batches} micro-batches")
    return [*lines, f"each step moves per process {'; '.join(moved)}"]
