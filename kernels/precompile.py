"""Pre-compile third-party kernels in child processes while the run starts, once for each machine.

FlashAttention 4 and quack compile a kernel when it is first used, for seconds in which the interpreter does nothing else, and
keep it on disk. Where a machine does not have a kernel yet, `start` compiles it while the run connects its ranks. Every rank of
the machine waits for it (`wait`), so that none compiles it a second time.
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

Compilation = Callable[[torch.device], object]
"""Has a kernel compiled, by using it on a device."""

PATIENCE = 120.0
"""Seconds for a process that compiles; the longest seen took seven."""

_PACKAGES = ("torch", "flash-attn-4", "quack-kernels", "nvidia-cutlass-dsl")
_started: dict[str, BaseProcess] = {}


def start(works: Mapping[str, Compilation]) -> None:
    """Start to compile the kernels, by name, that this machine does not have yet.

    For one rank of a machine, before it uses its GPU: a child forked from a process that does could not use it.
    """
    if torch.cuda.device_count() == 0 or driver.began():
        return
    with contextlib.suppress(OSError):  # a cache that can't be looked into, or as many processes as there may be
        for kernel, work in works.items():
            if kernel not in _started and not _mark(kernel).exists():
                process = multiprocessing.get_context("fork").Process(target=_compile, args=(kernel, work), daemon=True)
                process.start()
                _started[kernel] = process


def wait(kernel: str, work: Compilation, device: torch.device) -> None:
    """Wait until a kernel is on disk. Whoever is first compiles it, this process perhaps.

    Nothing is raised here: what goes wrong shows when the kernel is used.
    """
    process = _started.pop(kernel, None)
    if process is not None:
        process.join(PATIENCE)
        if process.is_alive():
            process.kill()
            process.join()
    with contextlib.suppress(Exception):
        _once(kernel, work, device)


def _compile(kernel: str, work: Compilation) -> None:
    """Compile in a child process. It prints nothing: if the kernel does not work, the run says so."""
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


def _once(kernel: str, work: Compilation, device: torch.device) -> None:
    def build(_: Path) -> None:
        work(device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    build_once(_mark(kernel), build)


def _mark(kernel: str) -> Path:
    """Name the folder whose existence means that a kernel was compiled here, with the packages of these versions.

    The packages keep kernels in the machine's own temporary folder, whereas the cache may be one that machines share.
    """
    versions: list[str] = []
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{package} {importlib.metadata.version(package)}")
    key = hashlib.sha256("; ".join([kernel, platform.node(), *versions]).encode()).hexdigest()[:16]
    return cache_folder(None) / "compiled" / key
