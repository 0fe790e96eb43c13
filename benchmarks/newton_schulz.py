"""Time Newton–Schulz iterations on one GPU: iterations apart and together, by torch's products and by quack's, batch by batch.

    python benchmarks/newton_schulz.py
    python benchmarks/newton_schulz.py batches=4x2048x8192,4x8192x2048 repeats=20 errors=1
    python benchmarks/newton_schulz.py batches=2x64x256 device=cpu repeats=1

A batch is matrices x rows x columns. Prints a line of JSON for each batch and dtype of the iteration: milliseconds of the form
that a run takes, and of each other. `groups` says how many iterations are taken on each Gram matrix. errors=1 prints the
relative errors (Frobenius norms) of the first matrix beside fp64, too. Results: docs/measurements/optimizers.md.
"""

# pyright: basic, reportMissingImports=false, reportPrivateUsage=false

from __future__ import annotations

import dataclasses
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable

import torch
from arguments import read

from meshloom.kernels import symmetric
from meshloom.optim.optimizers import newton_schulz
from meshloom.optim.optimizers.newton_schulz import COEFFICIENTS, EPS, ITERATED_IN, STEPS, orthogonalize
from meshloom.optim.optimizers.newton_schulz_forms import groups_of_steps

TOGETHER, APART = (3, 2), (1,) * STEPS
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


@dataclasses.dataclass
class Settings:
    """A measurement. dtypes: of the iteration, some of DTYPES; the matrices are bf16"""

    batches: str = (
        "2x2048x2048,16x2048x2048,2x512x2048,32x512x2048,3x2048x8192,4x2048x8192,8x2048x8192,4x8192x2048,32x1024x2048"
    )
    dtypes: str = "fp16,bf16"
    device: str = "cuda"
    repeats: int = 12
    errors: int = 0


def matrices_of(count: int, rows: int, columns: int, device: str) -> list[torch.Tensor]:
    """Draw matrices of an uneven spectrum, as momenta have: 64 directions over three decades, and noise."""
    torch.manual_seed(0)
    rank = min(64, rows, columns)
    sizes = torch.logspace(0, -3, rank, device=device)
    return [
        (0.05 * torch.randn(rows, columns, device=device)
         + torch.randn(rows, rank, device=device) * sizes @ torch.randn(rank, columns, device=device)).bfloat16()
        for _ in range(count)
    ]  # fmt: skip


def milliseconds(call: Callable[[], object], device: str, repeats: int) -> float:
    """Return the median time of a call."""
    times: list[float] = []
    for repeat in range(repeats + 2):
        if device == "cpu":
            began = time.perf_counter()
            call()
            times.append(1000 * (time.perf_counter() - began))
            continue
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
        if repeat == 1:
            times.clear()  # of kernels that were loaded
    return statistics.median(times)


def exact(matrix: torch.Tensor) -> torch.Tensor:
    """Iterate in fp64."""
    a, b, c = COEFFICIENTS
    x = matrix.double() if matrix.shape[0] <= matrix.shape[1] else matrix.double().T
    x = x / (x.norm() + EPS)
    for _ in range(STEPS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if matrix.shape[0] <= matrix.shape[1] else x.T


def main() -> None:
    """Time and print."""
    settings = read(Settings(), sys.argv[1:])
    device = torch.device(settings.device, 0) if settings.device != "cpu" else torch.device("cpu")
    reason = symmetric.unsupported_reason(device)
    print(f"torch {torch.__version__}; quack: {reason or 'used'}", flush=True)
    fits = symmetric._fits
    for batch in settings.batches.split(","):
        count, rows, columns = map(int, batch.split("x"))
        matrices = matrices_of(count, rows, columns, settings.device)
        wanted = exact(matrices[0]) if settings.errors else None
        for dtype in settings.dtypes.split(","):
            ITERATED_IN["cuda"] = DTYPES[dtype]
            row: dict[str, object] = {"batch": batch, "dtype": dtype, "groups": groups_of_steps(rows, columns)}
            ways = {"run": (None, fits)}
            for form, groups in (("apart", APART), ("together", TOGETHER)):
                ways[f"{form}, torch"] = groups, lambda *_: False
                if reason is None:
                    ways[f"{form}, quack"] = groups, lambda *_: True
            for name, (groups, chosen) in ways.items():
                symmetric._fits = chosen
                newton_schulz.groups_of_steps = (lambda *_, groups=groups: groups) if groups else groups_of_steps
                call = functools.partial(orthogonalize, matrices)
                row[name] = round(milliseconds(call, settings.device, settings.repeats), 3)
                if wanted is not None:
                    found = orthogonalize(matrices[:1])[0].double()
                    row[f"{name}, error"] = float(f"{(found - wanted).norm() / wanted.norm():.3g}")
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
