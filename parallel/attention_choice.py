"""Choose a run's attention kernel: the fastest over all ranks, measured once on each kind of machine and then remembered.

It is remembered so that a resumed run computes as before: noise in a new measurement might choose another kernel, which rounds
otherwise.
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

from ..config.cache import cache_folder
from ..config.problems import Problem
from ..kernels import precompile
from ..kernels.attention_blocks import Kernel
from ..kernels.attention_timing import KERNELS, Shape, fastest, flash4_compilations, seconds, unsupported_reason
from ..models.config import DecoderConfig
from .config import ParallelConfig
from .mesh import Mesh

log = logging.getLogger(__name__)

Times = Mapping[Kernel, float]

LONGEST = 16_384
"""Positions: which kernel is faster does not change any more beyond, and a pass over a million takes a minute."""


def choose_attention(
    model: DecoderConfig, mesh: Mesh, parallel: ParallelConfig, seq_len: int, window: int | None = None
) -> Kernel:
    """Choose the kernel for all ranks: as this machine remembers, or else as all ranks measure now.

    window: of the layers that it is for.
    A kernel that cannot compute the shape on some rank is left out. One that should and yet fails is left out of this run
    only: it is tried again when the next begins, while the others keep the times that they had.
    """
    shape = shape_of(model, parallel, seq_len, window)
    record, work = record_path(), f"{machine()}, {mesh.layout.world_size} processes, {shape}"
    usable, times = _known(record, work, shape, mesh)
    if "flash4" in usable:  # also where another machine's times are remembered
        for name, compilation in flash4_compilations(shape).items():
            precompile.wait(name, compilation, mesh.device)
    new = _measured([kernel for kernel in usable if kernel not in times], shape, mesh)
    ran: dict[Kernel, float] = {kernel: time for kernel, time in new.items() if math.isfinite(time)}
    if mesh.is_main and ran:
        remember(record, work, ran)
    lasting = times | ran
    chosen = fastest({kernel: lasting.get(kernel, math.inf) for kernel in KERNELS})
    if mesh.is_main:
        how = {kernel: "measured" if kernel in new else f"as {record} remembers" for kernel in lasting}
        each = "; ".join(f"{kernel} {1000 * time:.2f} ms, {how[kernel]}" for kernel, time in lasting.items())
        what = "attention" if window is None else f"attention through a window of {window}"
        log.info("%s by %s: %s", what, chosen, each or "no ready kernel can compute it")
    return chosen


def shape_of(model: DecoderConfig, parallel: ParallelConfig, seq_len: int, window: int | None = None) -> Shape:
    """Return what a rank's kernel computes at once: in a ring a part of the sequence, with Ulysses a part of the heads."""
    ways = parallel.tp * (parallel.cp if parallel.cp_kind == "ulysses" else 1)
    seen = seq_len // parallel.cp if parallel.cp_kind == "ring" else seq_len
    length, heads, kv_heads = min(seen, LONGEST), max(1, model.heads // ways), max(1, model.kv_heads // ways)
    window = None if window is None or window >= length else window
    return Shape(length, heads, kv_heads, model.head_width, window, model.attention_softcap)


def ring_kernel_problems(model: DecoderConfig, parallel: ParallelConfig, chosen: Mapping[int | None, Kernel]) -> list[Problem]:
    """Return what is wrong where a ring's blocks would keep all their scores on a GPU."""
    hybrid = parallel.hdp != "none"
    rings = hybrid or (parallel.cp > 1 and parallel.cp_kind == "ring")
    if not rings or model.attention_softcap is None or all(kernel == "flash4" for kernel in chosen.values()):
        return []
    text = "only FlashAttention 4 computes a ring's blocks with model.attention_softcap, and it can't run here"
    if hybrid:
        return [Problem("parallel.hdp", text, "use none")]
    return [Problem("parallel.cp_kind", text, "use ulysses, or parallel.cp=1")]


def windows_of(model: DecoderConfig) -> list[int | None]:
    """List the kinds of attention that layers have, by their windows; None: the kind without one."""
    return list(dict.fromkeys(block.attention.window for block in model.blocks()))


def record_path() -> Path:
    """Return the file of all times that this machine has measured. It may be deleted at any time."""
    return cache_folder(None) / "attention.json"


def machine() -> str:
    """Name what times depend on besides the work: the GPU, and the packages that bring the kernels."""
    versions = {"torch": str(torch.__version__), "cuDNN": str(torch.backends.cudnn.version())}
    for package in ("flash-attn-4", "nvidia-cutlass-dsl"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return ", ".join([torch.cuda.get_device_name(), *(f"{name} {version}" for name, version in versions.items())])


def read_record(record: Path) -> dict[str, dict[Kernel, float]]:
    """Read times by machine and work. What can't be read is left out."""
    try:
        content = json.loads(record.read_text(encoding="utf-8"))
        return {
            work: {kernel: float(times[kernel]) for kernel in KERNELS if _is_time(times.get(kernel))}
            for work, times in content.items()
        }
    except (OSError, ValueError, AttributeError):
        return {}


def _is_time(value: object) -> bool:
    return isinstance(value, int | float) and 0 < value < math.inf


def remember(record: Path, work: str, times: Times) -> None:
    """Add a work's times, all finite, to the record. Where it can't be written, the next run measures again."""
    beside = record.with_name(f".{record.name}.{os.getpid()}")
    try:
        record.parent.mkdir(parents=True, exist_ok=True)
        before = read_record(record)
        content = {**before, work: {**before.get(work, {}), **times}}
        beside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        beside.replace(record)
    except OSError as error:
        log.info("the times of attention's kernels are not remembered: %s", error)
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


def _known(record: Path, work: str, shape: Shape, mesh: Mesh) -> tuple[list[Kernel], dict[Kernel, float]]:
    """Find the kernels that every rank can use, and the main rank's record of their times."""
    refusals = [unsupported_reason(kernel, shape, mesh.device) for kernel in KERNELS]
    for kernel, reason in zip(KERNELS, refusals, strict=True):
        if reason is not None:
            log.info("attention kernel %s is not used: %s", kernel, reason)
    recorded = read_record(record).get(work, {}) if mesh.is_main else {}
    told = [[float(reason is not None) for reason in refusals], [recorded.get(kernel, 0.0) for kernel in KERNELS]]
    refused, shared = mesh.sum(torch.tensor(told, dtype=torch.float64, device=mesh.device)).tolist()
    usable: list[Kernel] = [kernel for kernel, ranks in zip(KERNELS, refused, strict=True) if not ranks]
    return usable, {kernel: time for kernel, time in zip(KERNELS, shared, strict=True) if time and kernel in usable}


def _measured(kernels: list[Kernel], shape: Shape, mesh: Mesh) -> dict[Kernel, float]:
    """Average the times over all ranks, in seconds; infinite for a kernel that failed on one."""
    if not kernels:
        return {}
    mine = torch.tensor([seconds(kernel, shape, mesh.device) for kernel in kernels], dtype=torch.float64, device=mesh.device)
    return dict(zip(kernels, (mesh.sum(mine) / mesh.layout.world_size).tolist(), strict=True))
