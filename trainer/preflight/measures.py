"""Measurements of a check before a run: small, so that a short one takes a second."""

from __future__ import annotations

import contextlib
import os
import platform
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from ... import __version__

WARM_UP = 2
STORAGE_BYTES = 2**23


@dataclass(frozen=True)
class Sizes:
    """Sizes of what is measured: side of a square product, bytes of a copy and of a message, and how often."""

    product: int
    copy: int
    message: int
    repeats: int


GPU = Sizes(8192, 2**30, 2**26, 5)
GPU_SHORT = Sizes(8192, 2**28, 2**24, 3)
CPU = Sizes(512, 2**24, 2**20, 5)
"""On a processor the ranks share its cores: rates only show that something works."""


@dataclass(frozen=True)
class Report:
    """The findings of one rank.

    product   FLOP/s of a matrix product, bf16 on a GPU; copy: bytes/s read and written; None: not measured
    links     peer → bytes/s in each direction
    write     bytes/s onto the run's folder; None: another rank of this node measured it
    storage   what is wrong with the run's folder; "": nothing
    clock     seconds since 1970 by this node's clock, when all had just met
    versions  of what must be alike on all nodes
    """

    rank: int
    host: str
    device: str
    product: float | None
    copy: float | None
    links: dict[int, float]
    write: float | None
    storage: str
    clock: float
    versions: dict[str, str]


def versions() -> dict[str, str]:
    """Return the versions that all nodes must have alike."""
    found = {"meshloom": __version__, "torch": torch.__version__, "python": platform.python_version()}
    if torch.cuda.is_available():
        nccl: Any = torch.cuda  # whose module `nccl` its stub does not know
        found["nccl"] = ".".join(map(str, nccl.nccl.version()))
        with contextlib.suppress(OSError, IndexError):
            found["driver"] = Path("/proc/driver/nvidia/version").read_text().split("Kernel Module")[1].split()[0]
    return found


def device_name(device: torch.device) -> str:
    """Return the name of a rank's device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "processor"


def seconds(device: torch.device, repeats: int, run: Callable[[], object]) -> float:
    """Return the median time of a call, after some to warm up."""
    times: list[float] = []
    for number in range(WARM_UP + repeats):
        _wait(device)
        began = time.perf_counter()
        run()
        _wait(device)
        if number >= WARM_UP:
            times.append(time.perf_counter() - began)
    return median(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def product_rate(device: torch.device, sizes: Sizes) -> float:
    """Return the FLOP/s of a square matrix product."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a, b = (torch.randn(sizes.product, sizes.product, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * sizes.product**3 / seconds(device, sizes.repeats, lambda: torch.mm(a, b, out=out))


def copy_rate(device: torch.device, sizes: Sizes) -> float:
    """Return the bytes per second that a copy within the device's memory reads and writes."""
    source = torch.zeros(sizes.copy // 4, device=device)
    target = torch.empty_like(source)
    return 2 * sizes.copy / seconds(device, sizes.repeats, lambda: target.copy_(source))


def pairings(ranks: int) -> Iterator[list[tuple[int, int]]]:
    """Yield rounds of pairs that meet at the same time, until each rank has met each other: a round-robin tournament."""
    seats = list(range(ranks + ranks % 2))
    for _ in range(len(seats) - 1):
        pairs = [(seats[at], seats[-1 - at]) for at in range(len(seats) // 2)]
        yield [(min(pair), max(pair)) for pair in pairs if max(pair) < ranks]
        seats = [seats[0], seats[-1], *seats[1:-1]]


def link_rate(peer: int, device: torch.device, sizes: Sizes) -> float:
    """Exchange messages with a peer, both ways at once. Returns the bytes per second in each direction. Both call it."""
    sent = torch.zeros(sizes.message // 4, device=device)
    received = torch.empty_like(sent)

    def exchange() -> None:
        works = dist.batch_isend_irecv([dist.P2POp(dist.isend, sent, peer), dist.P2POp(dist.irecv, received, peer)])
        for work in works:
            work.wait()

    return sizes.message / seconds(device, sizes.repeats, exchange)


def storage_rate(folder: Path) -> tuple[float, str]:
    """Write, flush, rename onto another file and read back. Returns bytes per second, and what is wrong ("": nothing)."""
    name = f".check-{socket.gethostname()}-{os.getpid()}"
    new, old = folder / f"{name}.new", folder / name
    content = os.urandom(2**20) * (STORAGE_BYTES // 2**20)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        old.write_bytes(b"old")
        began = time.perf_counter()
        with new.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        rate = len(content) / (time.perf_counter() - began)
        new.replace(old)
        wrong = "" if not new.exists() and old.read_bytes() == content else "a file that was renamed onto another is not there"
        return rate, wrong
    except OSError as error:
        return 0.0, f"{error.filename or folder}: {error.strerror or error}"
    finally:
        for path in (new, old):
            with contextlib.suppress(OSError):
                path.unlink()
