"""Kernels of other packages are compiled beside a run's beginning, in processes of their own, and once for a machine.

FlashAttention 4 and quack compile a kernel when it is first used, for seconds in which the interpreter does nothing else, and
keep it on disk. On a machine where that is still to be done, `begin` has it done while the run connects its ranks. `compiled`
waits for it, as do the machine's other ranks, which then find the kernels instead of compiling them, too.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import logging
import multiprocessing
import os
import platform
import signal
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from torch.multiprocessing import _prctl_pr_set_pdeathsig  # pyright: ignore[reportAttributeAccessIssue]

from ..config.cache import build_once, cache_folder
from . import driver

log = logging.getLogger(__name__)

Work = Callable[[torch.device], object]
"""Has a kernel compiled, by using it on a device."""

PATIENCE = 120.0
"""Seconds for a process that compiles; the longest seen took seven."""

_PACKAGES = ("torch", "flash-attn-4", "quack-kernels", "nvidia-cutlass-dsl")
_begun: dict[str, BaseProcess] = {}


def begin(works: Mapping[str, Work]) -> None:
    """Have kernels compiled from now on, by name, that this machine has not yet. For one rank of a machine, before it uses its
    GPU: from a process that does, none can be forked that could.
    """
    if torch.cuda.device_count() == 0 or driver.began():
        return
    with contextlib.suppress(OSError):  # a cache that can't be looked into, or as many processes as there may be
        for kernel, work in works.items():
            if kernel not in _begun and not _mark(kernel).exists():
                process = multiprocessing.get_context("fork").Process(target=_compile, args=(kernel, work), daemon=True)
                process.start()
                _begun[kernel] = process


def compiled(kernel: str, work: Work, device: torch.device) -> None:
    """Return when a kernel is on disk: compiled by whoever was the first to begin, this process perhaps.

    What goes wrong shows when the kernel is used: here nothing is raised.
    """
    process = _begun.pop(kernel, None)
    if process is not None:
        process.join(PATIENCE)
        if process.is_alive():
            process.kill()
            process.join()
    with contextlib.suppress(Exception):
        _once(kernel, work, device)


def _compile(kernel: str, work: Work) -> None:
    """In a process of its own, which says nothing: the run does, should it be in trouble with the kernel."""
    _prctl_pr_set_pdeathsig(signal.SIGKILL)  # with the run: it may hang, and has a GPU and a lock
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    with contextlib.suppress(Exception):
        if driver.shared(0):  # the run is about to use it
            device = torch.device("cuda", 0)
            torch.cuda.set_device(device)
            _once(kernel, work, device)
    os._exit(0)


def _once(kernel: str, work: Work, device: torch.device) -> None:
    def build(_: Path) -> None:
        work(device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    build_once(_mark(kernel), build)


def _mark(kernel: str) -> Path:
    """A folder that says, by being there, that a kernel was compiled on this machine, with the packages of these versions.

    The packages keep kernels in the machine's own temporary folder, whereas the cache may be one that machines share.
    """
    versions: list[str] = []
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{package} {importlib.metadata.version(package)}")
    key = hashlib.sha256("; ".join([kernel, platform.node(), *versions]).encode()).hexdigest()[:16]
    return cache_folder(None) / "compiled" / key
