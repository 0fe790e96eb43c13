"""Account for what a rank offloads from its GPU and moves in a step, for both engines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..config.precision import PRECISIONS
from .cost import RankCost
from .memory import Job, WeightGroup


@dataclass(frozen=True)
class OffloadAccount:
    """Bytes of one rank: held on the host and on disk, and moved in one step between GPU, host and disk."""

    host: int = 0
    disk: int = 0
    to_host: int = 0
    from_host: int = 0
    disk_read: int = 0
    disk_written: int = 0


def pinned(size: int) -> int:
    """Return the bytes that PyTorch pins for a buffer of this size: the next power of two."""
    return 1 << (size - 1).bit_length() if size else 0


def torch_offload_cost(rank: RankCost, groups: Sequence[WeightGroup], zero: int, job: Job) -> tuple[RankCost, OffloadAccount]:
    """Account for FSDP2's CPU offload: fp32 shards of weights and gradients, pinned, and the optimizer's state on the host.

    rank: the account of the layout with `parallel.offload=cpu`, of which this takes away what is on the host. The GPU
    fetches the fp32 shards for each forward and backward pass under ZeRO-3, for each step below; a gradient goes back where
    it is reduced: with every micro-batch under ZeRO-2 and 3, once a step below. Under ZeRO-2 and 3 the host adds up; below, the
    GPU does, whole gradients. The update is the host's, and so is what it holds.
    """
    exact = PRECISIONS[job.precision].accum_bytes
    locked = sum(pinned(each.padded * exact) for group in groups for each in group.shards)
    away = OffloadAccount(
        # The gradients that the update reads are in pinned buffers already; what else it holds is not.
        host=2 * locked + (rank.optimizer or 0) + rank.update - rank.weights,
        to_host=rank.weights * (job.micro_batches if zero >= 2 else 1),
        from_host=rank.weights * (2 * job.micro_batches if zero == 3 else 1),
    )
    held = 0 if zero >= 2 else rank.held
    kept = replace(rank, weights=0, gradients=rank.gradients - rank.weights, held=held, update=0)
    return replace(kept, optimizer=None if rank.optimizer is None else 0), away


def describe(away: OffloadAccount) -> list[str]:
    """Describe for a plan what is offloaded where, and what a step moves. Empty when nothing is offloaded."""
    if away == OffloadAccount():
        return []

    def gib(count: int) -> str:
        return f"{count / 2**30:.3g} GiB"

    places = [f"{gib(count)} {where}" for count, where in ((away.host, "in host memory"), (away.disk, "on disk")) if count]
    lines = [f"each process keeps {' and '.join(places)}, beside the table's figures, which are the GPU's"]
    moved = [f"{gib(away.to_host)} from the GPU to the host, {gib(away.from_host)} back"]
    if away.disk_read or away.disk_written:
        moved.append(f"{gib(away.disk_read)} read from disk, {gib(away.disk_written)} written")
    return [*lines, f"each step moves per process {'; '.join(moved)}"]
