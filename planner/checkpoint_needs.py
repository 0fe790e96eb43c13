"""Compute what checkpoints need besides GPUs: host memory for snapshots, and room on disks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..checkpoint.config import CheckpointConfig
from ..checkpoint.saving.staging_size import rounded
from ..parallel.layout import Layout
from .tables import gib


@dataclass(frozen=True)
class CheckpointNeeds:
    """Host memory and disk space that checkpoints need, in bytes.

    step      one checkpoint, of all ranks
    kept      checkpoints on the disk at once: those that stay and the one being written; None where all stay
    least     of host memory of the fullest process without which its saves fail: one snapshot or, with the memory tier, two
    host      its host memory for snapshots
    spill     what it takes in `checkpoint.snapshot_folder` instead
    """

    step: int = 0
    kept: int | None = 1
    least: int = 0
    host: int = 0
    spill: int = 0


def checkpoint_needs(
    settings: CheckpointConfig, layout: Layout, held: Sequence[int], experts: Sequence[float] = ()
) -> CheckpointNeeds:
    """Compute the needs of a layout's checkpoints.

    held: by pipeline coordinate, bytes of weights and optimizer state of a rank there, which are all that is saved; experts:
    the share of these that are experts that expert parallelism deals out.
    What several ranks hold is divided among them. Memory is that of as many snapshots as fit `checkpoint.host_memory_gib`,
    two or, with the in-memory tier, three, and of that tier's parity: of the version that counts and of the one to come.
    """
    if settings.every == 0:
        return CheckpointNeeds()
    copies = layout.gradient_ranks // layout.weight_ranks
    shares = experts or [0.0] * len(held)
    written = [
        math.ceil(size * (1 - share) / copies + size * share / layout.expert_copies)
        for size, share in zip(held, shares, strict=True)
    ]
    largest, step = rounded(max(written)), sum(written) * layout.world_size // layout.pp
    kept = settings.keep + 1 if settings.keep else None
    if settings.snapshot_folder is not None:
        return CheckpointNeeds(step, kept, spill=largest)
    in_memory = settings.memory_every is not None
    snapshots = (3 if in_memory else 2) * largest
    if settings.host_memory_gib is not None:
        snapshots = min(snapshots, int(settings.host_memory_gib * 2**30) // largest * largest)
    group = min(settings.memory_group, layout.world_size)
    parity = 2 * -(-max(written) // (group - 1)) if in_memory and group > 1 else 0
    return CheckpointNeeds(step, kept, (2 if in_memory else 1) * largest, snapshots + parity)


def fewer_snapshots(needs: CheckpointNeeds) -> str:
    """Name settings that need less host memory."""
    elsewhere = "use checkpoint.snapshot_folder instead, without checkpoint.memory_every"
    if needs.host <= needs.least:
        return elsewhere
    return f"set it to {math.ceil(needs.least * 1000 / 2**30) / 1000:g}, for as few as can be, or {elsewhere}"


def describe_needs(needs: CheckpointNeeds) -> list[str]:
    """Describe the needs in sentences for a plan."""
    if not needs.step:
        return []
    stay = (
        "all of them stay" if needs.kept is None else f"{needs.kept} are on the disk at once, the one being written among them"
    )
    lines = [f"a checkpoint takes {gib(needs.step)} GiB; {stay} (checkpoint.keep)"]
    if needs.host:
        lines.append(f"snapshots take {gib(needs.host)} GiB of host memory per process (checkpoint.host_memory_gib limits it)")
    if needs.spill:
        lines.append(f"a snapshot takes {gib(needs.spill)} GiB per process in checkpoint.snapshot_folder")
    return lines
