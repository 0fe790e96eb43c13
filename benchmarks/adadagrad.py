"""AdAdaGrad and AdAdaGrad-Norm (arXiv 2402.11215) on a small task: constant batches beside the norm test's.

    python benchmarks/adadagrad.py --output outputs/adadagrad
    python benchmarks/adadagrad.py --draw outputs/adadagrad/summary.json

The task: from three lines of Python's standard library, say which of ten packages they are from. Counts of character trigrams,
hashed, go through two layers. Optimizers and controllers are those of `optim=adagrad|adagrad_norm` and `batch=norm_test`; the
model is too small for a trainer. As in the paper the rate is a constant, the batch never shrinks, and every run sees the same
number of samples, the same in the same order. The variance is measured between single samples, as in the paper.
"""

from __future__ import annotations

import argparse
import json
import sysconfig
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy

from meshloom.config.duration import Duration, Unit
from meshloom.optim.batch.adaptive import NormTest
from meshloom.optim.batch.config import FixedConfig, NormTestConfig
from meshloom.optim.batch.controller import Controller, Fixed
from meshloom.optim.batch.statistics import GradientStatistics
from meshloom.optim.horizon import Horizon
from meshloom.optim.optimizers.adagrad import AdaGrad, AdaGradNorm
from meshloom.optim.optimizers.config import AdaGradConfig, AdaGradNormConfig
from meshloom.optim.optimizers.parameters import NamedParameter, Unsharded
from meshloom.optim.progress import Progress

PACKAGES = ("asyncio", "ctypes", "email", "http", "importlib", "json", "logging", "multiprocessing", "unittest", "xml")
FEATURES = 512
HIDDEN = 32
LENGTH = 20.0
SMALL, LARGE = 16, 1024
INTERVAL = 10  # steps between tests
MEASURED = 128  # samples of a batch whose gradients are taken one by one, at most

OPTIMIZERS: dict[str, Callable[[Sequence[NamedParameter]], torch.optim.Optimizer]] = {
    "AdaGrad": lambda parameters: AdaGrad(AdaGradConfig(lr=0.05), parameters, Unsharded()),
    "AdaGrad-Norm": lambda parameters: AdaGradNorm(AdaGradNormConfig(lr=4.0), parameters, Unsharded()),
}
ETAS = (0.7, 0.9, 1.2)


def task() -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """(features, labels) to train on, and every fifth window to validate with; features (windows, FEATURES)."""
    rows: list[torch.Tensor] = []
    labels: list[int] = []
    for label, package in enumerate(PACKAGES):
        for path in sorted((Path(sysconfig.get_path("stdlib")) / package).rglob("*.py")):
            if "test" in path.parts:
                continue
            lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
            for start in range(0, len(lines) - 2, 3):
                rows.append(features("\n".join(lines[start : start + 3])))
                labels.append(label)
    x, y = torch.stack(rows), torch.tensor(labels)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    held = torch.arange(len(y)) % 5 == 0
    return (x[order][~held], y[order][~held]), (x[order][held], y[order][held])


def features(text: str) -> torch.Tensor:
    """Counts of hashed character trigrams, scaled to length LENGTH."""
    counts = torch.zeros(FEATURES)
    for start in range(len(text) - 2):
        counts[zlib.crc32(text[start : start + 3].encode()) % FEATURES] += 1
    return LENGTH * counts / counts.norm().clamp(min=1)


def controllers(samples: int) -> dict[str, Controller]:
    """Name → controller: two constant batches, and the norm test at three thresholds."""
    horizon = Horizon(Duration(samples, Unit.SAMPLES), 1)
    found: dict[str, Controller] = {
        f"constant {size}": Fixed(FixedConfig(samples=size, micro=1), horizon) for size in (SMALL, LARGE)
    }
    for eta in ETAS:
        config = NormTestConfig(
            samples=SMALL, micro=1, max=LARGE, interval=INTERVAL, growth=2.0, eta=eta, ema=0.0, shrink=False
        )
        found[f"η = {eta:g}"] = NormTest(config, horizon)
    return found


def measured(model: nn.Module, x: torch.Tensor, y: torch.Tensor, batch: int) -> GradientStatistics:
    """From the gradients of the first MEASURED single samples of a batch of that size."""
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(weights: dict[str, torch.Tensor], row: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        return cross_entropy(functional_call(model, weights, (row.unsqueeze(0),)), label.unsqueeze(0))

    each = vmap(grad(loss), in_dims=(None, 0, 0))(weights, x[:MEASURED], y[:MEASURED])
    g_BD = torch.cat([tensor.flatten(1) for tensor in each.values()], dim=1)
    whole = torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in model.parameters()])
    variance, square = float(g_BD.var(0).sum()), float(whole @ whole)
    # What the record would hold had all of the batch been measured: A = ‖g‖² + tr Σ (b − 1) / b for workers of one sample.
    return GradientStatistics(square + variance * (batch - 1) / batch, square, workers=batch, worker_samples=1)


def train(name: str, controller: Controller, data: tuple[Any, Any], samples: int) -> dict[str, Any]:
    """One run. Returns steps, seconds, and the curve (samples, batch, validation loss, accuracy)."""
    (x, y), (held_x, held_y) = data
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, len(PACKAGES)))
    named = [NamedParameter(name, parameter, tuple(parameter.shape)) for name, parameter in model.named_parameters()]
    optimizer = OPTIMIZERS[name](named)
    epochs = -(-samples // len(y)) + 1
    order = torch.cat([torch.randperm(len(y), generator=torch.Generator().manual_seed(epoch)) for epoch in range(epochs)])
    progress, curve, seconds = Progress(), [], 0.0
    while progress.samples < samples:
        began = time.perf_counter()
        count = controller.next_batch(progress)
        at = order[progress.samples : progress.samples + count]
        loss = cross_entropy(model(x[at]), y[at])
        loss.backward()
        statistics = measured(model, x[at], y[at], count) if controller.measures(progress) else None
        optimizer.step()
        optimizer.zero_grad()
        before, progress = progress.samples, progress.after(count, count)
        if statistics is not None:
            controller.observe(statistics, loss.item(), progress)
        seconds += time.perf_counter() - began
        every = samples // 40
        if progress.samples // every > before // every:
            with torch.no_grad():
                logits = model(held_x)
            point = {"samples": progress.samples, "step": progress.step, "batch": count}
            right = (logits.argmax(1) == held_y).double().mean()
            curve.append({**point, "loss": cross_entropy(logits, held_y).item(), "accuracy": right.item()})
    return {"steps": progress.step, "seconds": seconds, "curve": curve}


def table(summary: dict[str, Any]) -> str:
    """Markdown: every run."""
    lines = ["| | batch | steps | mean batch | last batch | validation accuracy | loss |", "|---|---|---|---|---|---|---|"]
    for optimizer, runs in summary["runs"].items():
        for name, run in runs.items():
            last = run["curve"][-1]
            lines.append(
                f"| {optimizer} | {name} | {run['steps']} | {last['samples'] / run['steps']:.0f} | {last['batch']} "
                f"| {100 * last['accuracy']:.1f} % | {last['loss']:.3f} |"
            )
    return "\n".join(lines)


def draw(summary: dict[str, Any], folder: Path) -> None:
    """Accuracy over samples and over steps, and the batch, for each optimizer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(len(summary["runs"]), 3, figsize=(14, 7), layout="constrained", squeeze=False)
    for row, (optimizer, runs) in zip(grid, summary["runs"].items(), strict=True):
        for name, run in runs.items():
            points = {key: [point[key] for point in run["curve"]] for key in run["curve"][0]}
            row[0].plot(points["samples"], points["accuracy"], label=name)
            row[1].plot(points["step"], points["accuracy"], label=name)
            row[2].plot(points["samples"], points["batch"], label=name)
        row[0].set(xlabel="samples", ylabel="validation accuracy", title=optimizer)
        row[1].set(xlabel="steps", xscale="log")
        row[2].set(xlabel="samples", ylabel="batch", yscale="log")
        row[0].legend(fontsize=8)
        for axes in row:
            axes.grid(alpha=0.3)
    for ending in ("svg", "png"):
        figure.savefig(folder / f"adadagrad.{ending}", dpi=80)


def main() -> None:
    """Run, tabulate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/adadagrad"))
    parser.add_argument("--samples", type=int, default=120_000)
    parser.add_argument("--draw", type=Path, metavar="SUMMARY", help="only draw what a summary.json says")
    arguments = parser.parse_args()
    if arguments.draw is not None:
        draw(json.loads(arguments.draw.read_text()), arguments.draw.parent)
        return
    torch.set_num_threads(1)
    data = task()
    print(f"{len(data[0][1])} windows to train on, {len(data[1][1])} to validate with", flush=True)
    arguments.output.mkdir(parents=True, exist_ok=True)
    summary: dict[str, Any] = {"samples": arguments.samples, "runs": {}}
    for optimizer in OPTIMIZERS:
        for name, controller in controllers(arguments.samples).items():
            run = train(optimizer, controller, data, arguments.samples)
            summary["runs"].setdefault(optimizer, {})[name] = run
            print(f"{optimizer}, {name}: {run['steps']} steps, {run['seconds']:.0f} s", flush=True)
            (arguments.output / "summary.json").write_text(json.dumps(summary))
    (arguments.output / "table.md").write_text(table(summary) + "\n")
    print(table(summary))


if __name__ == "__main__":
    main()
