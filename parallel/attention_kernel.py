"""The attention kernel of a run: the fastest for all ranks together, measured once on machines of a kind and then remembered.

Remembered, so that a run that goes on computes as it did before: in another measurement noise may choose another kernel, and
with it other roundings.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path

import torch

from ..config.parallel import ParallelConfig
from ..data.cache import cache_folder
from ..models.attention_choice import KERNELS, Shape, prefer, seconds, why_not
from ..models.attention_kernels import Kernel
from ..models.llama import Llama
from .mesh import Mesh

log = logging.getLogger(__name__)

Times = Mapping[Kernel, float]

LONGEST = 16_384
"""Positions: which kernel is faster does not change any more beyond, and a pass over a million takes a minute."""


def choose_attention(model: Llama, mesh: Mesh, parallel: ParallelConfig, seq_len: int) -> None:
    """Let attention use the same kernel on every rank: as this machine remembers, or else as all ranks measure now."""
    shape = shape_of(model, parallel, seq_len)
    record, work = record_path(), f"{machine()}, {mesh.layout.world_size} processes, {shape}"
    times = _remembered(record, work, mesh)
    how = f"as {record} remembers"
    if times is None:
        times, complete = _measured(shape, mesh)
        how = "measured"
        if mesh.is_main and complete:
            remember(record, work, times)
    chosen = prefer(times)
    if mesh.is_main:
        each = ", ".join(f"{kernel} {1000 * time:.2f} ms" for kernel, time in times.items())
        log.info("attention by %s, %s: %s", chosen, how, each)


def shape_of(model: Llama, parallel: ParallelConfig, seq_len: int) -> Shape:
    """What a rank's kernel sees at once, of long sequences the beginning: a part of it in a ring, of the heads with Ulysses."""
    ways = parallel.tp * (parallel.cp if parallel.cp_kind == "ulysses" else 1)
    seen = seq_len // parallel.cp if parallel.cp_kind == "ring" else seq_len
    return Shape(min(seen, LONGEST), max(1, model.heads // ways), max(1, model.kv_heads // ways), model.head_dim)


def record_path() -> Path:
    """The file of all times that this machine has measured. It may be deleted at any time."""
    return cache_folder(None) / "attention.json"


def machine() -> str:
    """What times depend on besides the work: the GPU, and the packages that bring the kernels."""
    versions = {"torch": str(torch.__version__), "cuDNN": str(torch.backends.cudnn.version())}
    for package in ("flash-attn-4", "nvidia-cutlass-dsl"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return ", ".join([torch.cuda.get_device_name(), *(f"{name} {version}" for name, version in versions.items())])


def read_record(record: Path) -> dict[str, dict[Kernel, float]]:
    """Times by machine and work; what can't be read is not there."""
    try:
        content = json.loads(record.read_text(encoding="utf-8"))
        return {
            work: {kernel: math.inf if times[kernel] is None else float(times[kernel]) for kernel in KERNELS}
            for work, times in content.items()
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def remember(record: Path, work: str, times: Times) -> None:
    """Add times to the record. Where it can't be written, the next run measures again."""
    beside = record.with_name(f".{record.name}.{os.getpid()}")
    content = {
        each: {kernel: time if math.isfinite(time) else None for kernel, time in found.items()}  # JSON has no infinity
        for each, found in {**read_record(record), work: times}.items()
    }
    try:
        record.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        beside.replace(record)
    except OSError as error:
        log.info("the times of attention's kernels are not remembered: %s", error)
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


def _remembered(record: Path, work: str, mesh: Mesh) -> Times | None:
    """The main rank's record, for all; None where there is none, or where a rank can't use what it says."""
    found = read_record(record).get(work, {}) if mesh.is_main else {}
    shared = mesh.sum(torch.tensor([found.get(kernel, 0.0) for kernel in KERNELS], dtype=torch.float64, device=mesh.device))
    times = dict(zip(KERNELS, shared.tolist(), strict=True))
    gone = any(0 < time < math.inf and why_not(kernel) is not None for kernel, time in times.items())
    return None if mesh.any(gone) or not any(times.values()) else times


def _measured(shape: Shape, mesh: Mesh) -> tuple[Times, bool]:
    """Averages over all ranks, and whether every kernel that is there ran: what failed for once shall not for ever."""
    mine = [seconds(kernel, shape, mesh.device) for kernel in KERNELS]
    failed = any(math.isinf(time) and why_not(kernel) is None for kernel, time in zip(KERNELS, mine, strict=True))
    sums = mesh.sum(torch.tensor(mine, dtype=torch.float64, device=mesh.device)) / mesh.layout.world_size
    return dict(zip(KERNELS, sums.tolist(), strict=True)), not mesh.any(failed)
