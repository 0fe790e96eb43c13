"""Time each product and pass over memory of a mixture's experts on one Hopper GPU, with several tiles.

    python benchmarks/expert_products.py shape=A
    python benchmarks/expert_products.py shape=B tiles=128x192p,256x128 skew=1

Shapes A and B are those of docs/measurements/mixture_speed.md. A tile is rows x columns, p for "pingpong". Kernels are compiled
by several processes first. Prints milliseconds, TFLOP/s or GB/s of each, and what a layer's forward and backward pass take
with the best of each. What fails is printed, and left out.
"""

# pyright: reportMissingImports=false, reportUnknownLambdaType=false

from __future__ import annotations

import concurrent.futures
import dataclasses
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from arguments import read

from meshloom.kernels.experts import hopper
from meshloom.kernels.experts.gather_sum import gather_sum
from meshloom.kernels.swiglu import apart, in_turns
from meshloom.models.mixture.charges import count_assignments
from meshloom.models.mixture.dispatch import sort_by_expert

SHAPES = {"A": (32768, 32, 4, 2048, 1024), "B": (32768, 64, 8, 2048, 512), "tiny": (256, 4, 2, 128, 64)}
"""Name → tokens, experts, chosen, model width, an expert's width."""

PRODUCTS = ("gated", "down", "gated_backward", "dx", "weights_up", "weights_down")
REPEATS = 12


@dataclasses.dataclass
class Settings:
    """The products to time. products: some of PRODUCTS; skew: the later experts get more rows than the first."""

    shape: str = "A"
    tiles: str = "128x192p,128x256,256x128,256x192,128x128p"
    products: str = ",".join(PRODUCTS)
    skew: int = 0
    jobs: int = 8


def tile_of(text: str) -> Any:
    """Read rows x columns, and p for pingpong."""
    rows, columns = text.rstrip("p").split("x")
    return hopper.tile(int(rows), int(columns), text.endswith("p"))


class Work:
    """One layer's tensors."""

    def __init__(self, shape: str, skew: bool = False) -> None:
        tokens, count, top_k, dim, width = SHAPES[shape]
        self.sizes = SHAPES[shape]
        torch.manual_seed(0)

        def draw(*size: int, std: float = 1.0) -> torch.Tensor:
            return (torch.randn(*size, device="cuda") * std).bfloat16()

        score_TE = torch.rand(tokens, count, device="cuda")
        if skew:
            score_TE *= torch.linspace(0.3, 1, count, device="cuda")
        self.choice_TK = score_TE.topk(top_k, dim=-1).indices
        sort = sort_by_expert(self.choice_TK, count)
        self.order_N, self.place_TK = sort.order_N, sort.inverse_TK.int()
        self.token_N = (sort.order_N // top_k).int()
        self.bounds_E1 = F.pad(sort.counts_E.cumsum(0), (1, 0)).int()
        self.x_TD, self.dy_TD = draw(tokens, dim), draw(tokens, dim, std=1e-2)
        self.w1, self.w3 = (draw(count * width, dim, std=0.02) for _ in range(2))
        self.w2_EDF = draw(count, dim, width, std=0.02)
        self.w13_E2FD = in_turns(self.w1, self.w3).unflatten(0, (count, -1))
        self.both_N2F, self.hidden_NF = draw(tokens * top_k, 2 * width), draw(tokens * top_k, width)
        self.gates_TK = torch.rand(tokens, top_k, device="cuda")
        self.gate_N = torch.rand(tokens * top_k, device="cuda")
        self.rows_ND = draw(tokens * top_k, dim)
        self.dw13_E2FD, self.dw2_EDF = torch.empty_like(self.w13_E2FD), torch.empty_like(self.w2_EDF)

    def product(self, name: str, config: Any) -> None:
        """Compute one of PRODUCTS."""
        if name == "gated":
            hopper.gated(self.x_TD, self.w13_E2FD, self.token_N, self.bounds_E1, config)
        elif name == "down":
            hopper.rows(self.hidden_NF, self.w2_EDF.mT, self.bounds_E1, config)
        elif name == "gated_backward":
            hopper.gated_backward(self.dy_TD, self.w2_EDF, self.both_N2F, self.gate_N, self.token_N, self.bounds_E1, config)
        elif name == "dx":
            hopper.rows(self.both_N2F, self.w13_E2FD, self.bounds_E1, config)
        elif name == "weights_up":
            hopper.weights(self.x_TD, self.both_N2F, self.token_N, self.bounds_E1, self.dw13_E2FD.mT, config)
        else:
            hopper.weights(self.dy_TD, self.hidden_NF, self.token_N, self.bounds_E1, self.dw2_EDF, config)

    def flops(self, name: str) -> float:
        """Count a product's."""
        tokens, _, top_k, dim, width = self.sizes
        return 2.0 * tokens * top_k * dim * width * (2 if name in ("gated", "dx", "weights_up") else 1)

    def others(self) -> dict[str, tuple[Callable[[], object], float, float]]:
        """Name → what is computed, its FLOPs, and the bytes it moves at least: PyTorch's products, and passes over memory."""
        tokens, count, top_k, dim, width = self.sizes
        ends_E, rows = self.bounds_E1[1:], 2.0 * tokens * top_k * dim
        stream, weights = 2.0 * tokens * dim, 2.0 * count * dim * width
        w1_EFD, hidden_FN = self.w1.unflatten(0, (count, -1)), self.hidden_NF.T
        return {
            "F.grouped_mm, gate or up": (
                lambda: F.grouped_mm(self.rows_ND, w1_EFD.mT, offs=ends_E), self.flops("down"), 0,
            ),
            "F.grouped_mm, gate and up in one": (
                lambda: F.grouped_mm(self.rows_ND, self.w13_E2FD.mT, offs=ends_E), self.flops("gated"), 0,
            ),
            "F.grouped_mm, down": (
                lambda: F.grouped_mm(self.hidden_NF, self.w2_EDF.mT, offs=ends_E), self.flops("down"), 0,
            ),
            "F.grouped_mm, gradient of w2": (
                lambda: F.grouped_mm(self.rows_ND.T, self.hidden_NF, offs=ends_E), self.flops("down"), 0,
            ),
            "quack, gradient of gate and up, rows copied before": (
                lambda: hopper.package().gemm_tuned.fn(
                    self.rows_ND.T, self.both_N2F, self.dw13_E2FD.mT, cu_seqlens_k=self.bounds_E1, config=tile_of("128x192p")
                ), self.flops("dx"), 0,
            ),
            "quack, the same, transposed": (
                lambda: hopper.package().gemm_tuned.fn(
                    self.both_N2F.T, self.rows_ND, self.dw13_E2FD, cu_seqlens_k=self.bounds_E1, config=tile_of("128x192p")
                ), self.flops("dx"), 0,
            ),
            "quack, gradient of w2, rows copied before": (
                lambda: hopper.package().gemm_tuned.fn(
                    self.rows_ND.T, self.hidden_NF, self.dw2_EDF, cu_seqlens_k=self.bounds_E1, config=tile_of("128x192p")
                ), self.flops("down"), 0,
            ),
            "one dense product of gate's size": (lambda: self.rows_ND @ self.w1[:width].T, self.flops("down"), 0),
            "copy a token for each expert": (lambda: self.x_TD[self.token_N], 0, rows + stream),
            "sum a token's rows": (lambda: gather_sum(self.rows_ND, self.place_TK), 0, rows + stream),
            "the same with gates": (lambda: gather_sum(self.rows_ND, self.place_TK, self.gates_TK), 0, rows + stream),
            "gate and up in turns": (lambda: in_turns(self.w1, self.w3), 0, 4 * weights),
            "gradients of gate and up apart": (lambda: apart(self.dw13_E2FD.flatten(0, 1)), 0, 4 * weights),
            "sort assignments": (lambda: sort_by_expert(self.choice_TK, count), 0, 0),
            "count assignments": (
                lambda: count_assignments(self.choice_TK, self.choice_TK.new_ones(4, tokens // 4).bool(), count), 0, 0,
            ),
            "SwiGLU outside": (lambda: F.silu(hidden_FN.T) * self.hidden_NF, 0, 3 * rows * width / dim),
            "router in fp32": (lambda: self.x_TD.float() @ self.w1[:count].float().T, 0, 5 * stream),
        }  # fmt: skip


def milliseconds(call: Callable[[], object]) -> float:
    """Return the median of REPEATS, each with the cache flushed by what comes between."""
    for _ in range(2):
        call()
    begins, ends = ([torch.cuda.Event(enable_timing=True) for _ in range(REPEATS)] for _ in range(2))
    for begin, end in zip(begins, ends, strict=True):
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in zip(begins, ends, strict=True))


def compiled(task: tuple[str, str]) -> str:
    """Have a kernel compiled, in a process of its own. Returns what went wrong."""
    name, tile = task
    try:
        Work("tiny").product(name, tile_of(tile))
        torch.cuda.synchronize()
    except Exception as error:  # a tile that a product does not take
        return f"{name} with {tile}: {type(error).__name__}: {str(error)[:300]}"
    return ""


def main() -> None:
    """Compile, time, print."""
    settings = read(Settings(), sys.argv[1:])
    tiles, began = settings.tiles.split(","), time.perf_counter()
    tasks = [(name, tile) for name in settings.products.split(",") for tile in tiles]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(settings.jobs, mp_context=context) as pool:
        faults = dict(zip(tasks, pool.map(compiled, tasks), strict=True))
    print(*filter(None, faults.values()), sep="\n")
    print(f"{len(tasks)} kernels compiled in {time.perf_counter() - began:.0f} s", flush=True)
    work, best = Work(settings.shape, skew=bool(settings.skew)), dict[str, float]()
    for name, tile in tasks:
        if faults[name, tile]:
            continue
        spent = milliseconds(lambda name=name, tile=tile: work.product(name, tile_of(tile)))
        best[name] = min(spent, best.get(name, spent))
        print(f"{name:16} {tile:9} {spent:7.3f} ms {work.flops(name) / spent / 1e9:6.0f} TFLOP/s", flush=True)
    for name, (call, flops, moved) in work.others().items():
        try:
            spent = milliseconds(call)
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {str(error)[:200]}")
            continue
        rate = f"{flops / spent / 1e9:6.0f} TFLOP/s" if flops else f"{moved / spent / 1e6:6.0f} GB/s"
        print(f"{name:52} {spent:7.3f} ms {rate}", flush=True)
    print(f"the best of each product, a layer: {sum(best.values()):.2f} ms")


if __name__ == "__main__":
    main()
