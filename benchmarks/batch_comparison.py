"""Constant, staged and measured batch sizes on one corpus: loss against samples, steps and seconds.

    python benchmarks/batch_comparison.py --scale cpu --output outputs/batch
    python benchmarks/batch_comparison.py --draw outputs/batch/summary.json

Every run is a `meshloom train` of its own, of the same number of samples; the optimizer's rate follows the square root of the
batch in all of them (the constant large batch starts at the rate that the others would arrive at). Written to the output
folder: the runs, table.md, and summary.json, from which `--draw` makes batch.svg and batch.png. Runs that are there are
not run again.

`--runs small,norm-0.5` chooses some; a run written `small:2` has seed 2, to show how much two runs of one recipe differ.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from many_runs import FINISHED, run_all

SETTLING = 5  # first steps, in which kernels are compiled: their seconds are not counted


@dataclass(frozen=True)
class Scale:
    """A size of the experiment.

    samples        of every run
    small, large   constant batches; staged and measured ones begin at `small` and end at `large`, at most
    rate           learning rate of the small batch
    largest_micro  most samples in one pass
    etas           thresholds of the norm test; measured: its other settings
    """

    common: tuple[str, ...]
    samples: int
    seq_len: int
    small: int
    large: int
    rate: float
    largest_micro: int
    etas: tuple[float, ...]
    measured: tuple[str, ...]


COMMON = (
    *("recipe=quickstart", "data=stdlib", "resume=none", "trainer.steps=null", "trainer.sample_prompt=null"),
    *("checkpoint.every=0", "logging.progress=false", "schedule=wsd", "schedule.warmup=10%", "schedule.decay=20%"),
    "trainer.eval_every=5%",
)
SCALES = {
    "cpu": Scale(
        common=(
            *("model.dim=64", "model.layers=2", "model.heads=2", "model.kv_heads=1", "model.ffn_dim=192"),
            *("data.seq_len=128", "data.vocabulary=1024", "precision=fp32", "trainer.eval_samples=512"),
        ),
        samples=32_768,
        seq_len=128,
        small=8,
        large=256,
        rate=3e-3,
        largest_micro=32,
        etas=(0.5, 0.7, 0.9),
        measured=("batch.ema=0.9", "batch.growth=1.5", "batch.interval=4", "batch.shrink=true"),
    ),
    "gpu": Scale(
        common=(
            *("model.dim=768", "model.layers=12", "model.heads=12", "model.kv_heads=12", "model.ffn_dim=2048"),
            *("data.seq_len=512", "precision=bf16", "trainer.compile=true", "trainer.eval_samples=128"),
        ),
        samples=16_384,
        seq_len=512,
        small=8,
        large=256,
        rate=7e-4,
        largest_micro=64,
        etas=(0.5, 0.7, 0.9),
        measured=("batch.ema=0.9", "batch.growth=1.5", "batch.interval=4", "batch.shrink=true"),
    ),
}


def recipes(scale: Scale) -> dict[str, list[str]]:
    """Name of a run → its overrides."""
    small, large = scale.small, scale.large
    follow = f"optim.lr={scale.rate}", "optim.lr_coupling=sqrt"
    grows = f"batch.micro_max={scale.largest_micro}"
    runs = {
        "small": ["batch=fixed", f"batch.samples={small}", f"batch.micro={small}", f"optim.lr={scale.rate}"],
        "large": [
            *("batch=fixed", f"batch.samples={large}", f"batch.micro={scale.largest_micro}"),
            f"optim.lr={scale.rate * math.sqrt(large / small)}",
        ],
        "staged": ["batch=stages", f"batch.stages={_stages(small, large)}", f"batch.micro={small}", grows, *follow],
    }
    for eta in scale.etas:
        test = ["batch=norm_test", f"batch.samples={small}", f"batch.max={large}", f"batch.eta={eta}"]
        two = f"batch.micro={small // 2}"  # the least that there is something to compare in
        runs[f"norm-{eta:g}"] = [*test, two, grows, *scale.measured, *follow]
    return runs


def _stages(small: int, large: int) -> str:
    """Doubled at … 5 %, 10 %, 20 %, 40 % of the run: a warm-up by hand, as large models are trained with."""
    sizes = [small * 2**n for n in range(int(math.log2(large / small)) + 1)]
    starts = ["0", *(f"{40 / 2 ** (len(sizes) - 1 - n):g}%" for n in range(1, len(sizes)))]
    return "'" + " ".join(f"{start}:{size}" for start, size in zip(starts, sizes, strict=True)) + "'"


def command_line(name: str, overrides: list[str], scale: Scale, folder: Path) -> list[str]:
    """Behind `meshloom train`, for the run of this name."""
    length = f"trainer.tokens={scale.samples * scale.seq_len}"
    seed = name.partition(":")[2] or "1"
    return [*COMMON, *scale.common, *overrides, length, f"seed={seed}", f"output_dir={folder}"]


def read(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Rows of a run: steps (samples and seconds so far, loss, batch, noise scale) and evaluations (the same, eval_loss)."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timed = [row["step_seconds"] for row in rows if "step_seconds" in row]
    typical = statistics.median(timed[SETTLING : 4 * SETTLING] or timed)
    seconds, steps, evaluations = 0.0, [], []
    for row in rows:
        if "step_seconds" in row:
            seconds += typical if row["step"] <= SETTLING else row["step_seconds"]
            kept = {key: row[key] for key in ("step", "samples", "loss", "batch_samples")}
            steps.append(kept | {"seconds": seconds, "noise_scale": row.get("noise_scale")})
        elif "eval_loss" in row:
            last = steps[-1]
            evaluations.append({**last, "eval_loss": row["eval_loss"]})
    return {"steps": _thinned(steps, 400), "evaluations": evaluations}


def _thinned(steps: list[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """At most so many points, each with the mean loss of the steps since the one before."""
    stride = -(-len(steps) // most)
    groups = [steps[start : start + stride] for start in range(0, len(steps), stride)]
    return [group[-1] | {"loss": statistics.fmean(step["loss"] for step in group)} for group in groups]


def table(summary: dict[str, Any]) -> str:
    """Markdown: each run beside the constant small batch, after as many samples and at the loss that it came down to."""
    runs = summary["runs"]
    reference = runs["small"]["evaluations"]
    lines = [
        "| batch | steps | last batch | validation loss | small's steps ÷ these | at equal loss | samples for it ÷ small's "
        "| seconds of steps |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, run in runs.items():
        last = run["evaluations"][-1]
        same = _reached(reference, last["eval_loss"])
        equal = "| – | – " if same is None else f"| {same[0] / last['step']:.1f} | {last['samples'] / same[1]:.2f} "
        lines.append(
            f"| {name} | {last['step']} | {last['batch_samples']} | {last['eval_loss']:.3f} "
            f"| {reference[-1]['step'] / last['step']:.1f} {equal}| {last['seconds']:.0f} |"
        )
    return "\n".join(lines)


def _reached(evaluations: list[dict[str, Any]], loss: float) -> tuple[float, float] | None:
    """Steps and samples after which the validation loss first was so low, between evaluations linearly; None: never."""
    for before, after in itertools.pairwise(evaluations):
        if after["eval_loss"] <= loss:
            part = (before["eval_loss"] - loss) / (before["eval_loss"] - after["eval_loss"])
            step, samples = (before[key] + part * (after[key] - before[key]) for key in ("step", "samples"))
            return step, samples
    return None


def draw(summary: dict[str, Any], folder: Path) -> None:
    """Validation loss against samples, steps and seconds, and the batch sizes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(2, 2, figsize=(11, 8), layout="constrained")
    for name, run in summary["runs"].items():
        points = run["evaluations"]
        losses = [point["eval_loss"] for point in points]
        style = {"label": name, "linewidth": 1.2, "marker": "o", "markersize": 2.5}
        for axes, key in zip(grid.flat, ("samples", "step", "seconds"), strict=False):
            axes.plot([point[key] for point in points], losses, **style)
        steps = run["steps"]
        batches = [step["samples"] for step in steps], [step["batch_samples"] for step in steps]
        grid[1, 1].plot(*batches, label=name, linewidth=1.2)
    for axes, name in zip(grid.flat, ("samples", "steps", "seconds of steps"), strict=False):
        axes.set_xlabel(name)
        axes.set_ylabel("validation loss")
        if name != "samples":
            axes.set_xscale("log")
        axes.grid(alpha=0.3)
    lowest = min(point["eval_loss"] for run in summary["runs"].values() for point in run["evaluations"])
    early = max(run["evaluations"][len(run["evaluations"]) // 8]["eval_loss"] for run in summary["runs"].values())
    for axes in grid.flat[:3]:
        axes.set_ylim(lowest - 0.05 * (early - lowest), early)
    grid[1, 1].set_yscale("log", base=2)
    grid[1, 1].set_xlabel("samples")
    grid[1, 1].set_ylabel("batch, samples")
    grid[0, 0].legend(fontsize=8)
    for ending in ("svg", "png"):
        figure.savefig(folder / f"batch.{ending}", dpi=80)


def main() -> None:
    """Run, tabulate, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=SCALES, default="cpu")
    parser.add_argument("--output", type=Path, default=Path("outputs/batch"))
    parser.add_argument("--runs", help="names, separated by commas (default: all)")
    parser.add_argument("--draw", type=Path, metavar="SUMMARY", help="only draw what a summary.json says")
    parser.add_argument("--processes", type=int, default=1, help="runs at once; what a step takes is then not its own")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="further overrides, for all runs")
    parser.add_argument("--seconds", type=float, help="what has not finished by then is left out")
    parser.add_argument("--samples", type=int, help="of every run (default: the scale's)")
    arguments = parser.parse_args()
    if arguments.draw is not None:
        summary = json.loads(arguments.draw.read_text())
        draw(summary, arguments.draw.parent)
        print(table(summary))
        return
    scale = SCALES[arguments.scale]
    scale = dataclasses.replace(scale, samples=arguments.samples or scale.samples)
    known = recipes(scale)
    names = arguments.runs.split(",") if arguments.runs else list(known)
    folders = {name: arguments.output / name.replace(":", "-seed-") for name in names}
    lines = [command_line(name, [*known[name.partition(":")[0]], *arguments.set], scale, folders[name]) for name in names]
    run_all([lines[start :: arguments.processes] for start in range(arguments.processes)], arguments.output, arguments.seconds)
    finished = {name: read(folder) for name, folder in folders.items() if (folder / FINISHED).exists()}
    summary = {"scale": arguments.scale, "samples": scale.samples, "seq_len": scale.seq_len, "runs": finished}
    (arguments.output / "summary.json").write_text(json.dumps(summary))
    for name in names:
        if name not in finished:
            print(f"FAILED {name}: see {arguments.output}/work-*.log")
    if "small" in summary["runs"]:
        (arguments.output / "table.md").write_text(table(summary) + "\n")
        print(table(summary))


if __name__ == "__main__":
    main()
