"""Worlds for the checkpoint tests: named global arrays with known values, and ranks that hold boxes of them."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed import HashStore

from meshloom.checkpoint.checkpointer import Checkpointer
from meshloom.checkpoint.control import Control
from meshloom.checkpoint.report import SaveReport
from meshloom.parallel.box import Box
from meshloom.parallel.fragment import Fragment, boxes_of_flat_range

Arrays = dict[str, torch.Tensor]


def make_arrays(seed: int = 0, large: bool = False) -> Arrays:
    """Global arrays `<role>/<name>` of several types and ranks, one large enough for panels if asked."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    arrays = {
        "weight/embed.weight": draw(37, 24),
        "weight/layers.0.attention.wq.weight": draw(24, 24),
        "weight/layers.0.ffn.w1.weight": draw(64, 24),
        "weight/norm.weight": draw(24),
        "exp_avg/embed.weight": draw(37, 24),
        "exp_avg_sq/embed.weight": draw(37, 24).double(),
        "momentum/layers.0.ffn.w1.weight": draw(64, 24).bfloat16(),
        "weight/experts.w": draw(4, 6, 10),
        "scale/layers.0": draw(),
        "count/seen": torch.randint(0, 2**40, (11,), generator=generator),
    }
    if large:
        arrays["weight/head.weight"] = draw(4096, 1100)
    return arrays


def shares(shape: tuple[int, ...], world: int, rng: random.Random) -> list[list[Box]]:
    """Boxes of one array for each rank under a random legal layout: replicated, rows, columns, grid, flat (ZeRO), or hybrid."""
    if not shape:
        return [[Box((), ())] for _ in range(world)]
    kind = rng.choice(["replicated", "rows", "columns", "grid", "flat", "hybrid", "one"])
    if kind == "replicated":
        return [[Box.whole(shape)] for _ in range(world)]
    if kind == "one":
        owner = rng.randrange(world)
        return [[Box.whole(shape)] if rank == owner else [] for rank in range(world)]
    if kind == "flat":
        total = Box.whole(shape).numel
        share = -(-total // world)
        return [
            [box for box, _ in boxes_of_flat_range(shape, rank * share, max(0, min(share, total - rank * share)))]
            for rank in range(world)
        ]
    dim = 0 if kind in ("rows", "hybrid") or len(shape) == 1 else len(shape) - 1
    if kind == "hybrid" and world % 2 == 0:
        return [[*_slice(shape, dim, rank % (world // 2), world // 2)] for rank in range(world)]
    if kind == "grid" and world % 2 == 0 and len(shape) > 1:
        return [
            [c for r in _slice(shape, 0, rank // 2, world // 2) for c in _slice(r.shape, 1, rank % 2, 2, r.offsets)]
            for rank in range(world)
        ]
    return [_slice(shape, dim, rank, world) for rank in range(world)]


def _slice(shape: tuple[int, ...], dim: int, index: int, count: int, origin: tuple[int, ...] | None = None) -> list[Box]:
    share = -(-shape[dim] // count)
    low, high = min(index * share, shape[dim]), min((index + 1) * share, shape[dim])
    offsets = list(origin or (0,) * len(shape))
    offsets[dim] += low
    return [Box(tuple(offsets), (*shape[:dim], high - low, *shape[dim + 1 :]))] if high > low else []


def fragments(arrays: Arrays, world: int, seed: int, blank: bool = False) -> list[list[Fragment]]:
    """Each rank's fragments of the arrays under the random layout of this seed; `blank`: tensors full of other values."""
    rng = random.Random(seed)
    ranks: list[list[Fragment]] = [[] for _ in range(world)]
    for key, value in arrays.items():
        role, _, name = key.partition("/")
        for rank, boxes in enumerate(shares(tuple(value.shape), world, rng)):
            for box in boxes:
                tensor = value[box.slices()].clone()
                if blank:
                    tensor = torch.full_like(tensor, 77)
                ranks[rank].append(Fragment(name, role, tuple(value.shape), box, tensor))
    return ranks


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equality of type, shape and every bit."""
    size = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.dtype == b.dtype and a.shape == b.shape and bool(torch.equal(a.view(size), b.view(size)))


def holds(ranks: list[list[Fragment]], arrays: Arrays) -> bool:
    """Return whether all ranks' tensors have exactly the arrays' values."""
    return all(same_bits(f.tensor, arrays[f.key][f.box.slices()]) for rank in ranks for f in rank)


def together(world: int, body: Callable[[Control], Any]) -> list[Any]:
    """Run `body(control)` for each rank, each in a thread of its own, over one store; re-raises the first error."""
    store = HashStore()
    results: list[Any] = [None] * world
    errors: list[BaseException] = []

    def one(rank: int) -> None:
        try:
            results[rank] = body(Control(rank, world, store))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


class Gate:
    """A fault hook that holds up whoever comes to a boundary, until it is opened."""

    def __init__(self, boundary: str) -> None:
        self.boundary = boundary
        self.reached, self.open = threading.Event(), threading.Event()
        self.visitors: list[str] = []  # names of their threads

    def __call__(self, boundary: str, amount: int) -> int:
        if boundary == self.boundary:
            self.visitors.append(threading.current_thread().name)
            self.reached.set()
            assert self.open.wait(60)
        return amount


def told_of(run: Checkpointer, *steps: int) -> list[SaveReport]:
    """Poll until all these steps are reported; return the reports."""
    reports: list[SaveReport] = []
    deadline = time.monotonic() + 60
    while not {report.step for report in reports}.issuperset(steps):
        assert time.monotonic() < deadline, f"nothing is told of one of the steps {steps}"
        time.sleep(0.001)
        reports += run.poll()
    return reports
