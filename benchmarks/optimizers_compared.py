"""Optimizers on real text, each at the best learning rate of a small sweep: validation loss over tokens.

    python benchmarks/optimizers_compared.py data=some/folder output=outputs/optimizers
    python benchmarks/optimizers_compared.py data=some/folder size=gpu output=outputs/optimizers
    python benchmarks/optimizers_compared.py output=outputs/optimizers draw=true

Every run is a `meshloom train` of its own, and all see the same tokens. A sweep begins with three rates, each twice the one
before. While the best is the lowest or the highest of them, a further rate is tried. The best is then run with more seeds.
Runs that are there are not run again. Written to the output folder: the runs, table.md and optimizers.png.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import arguments
from many_runs import FINISHED, run_all

Evaluations = list[tuple[int, float]]
"""(tokens so far, validation loss) of a run."""


@dataclass(frozen=True)
class Size:
    """A size of the experiment.

    common  overrides of every run
    tokens  of every run
    rank    of low-rank optimizers: a quarter of the model's width
    """

    common: tuple[str, ...]
    tokens: int
    rank: int


@dataclass
class Settings:
    """Arguments, as key=value.

    data    a folder of text, read whole; size: cpu or gpu
    only    names of optimizers, separated by commas; "": all
    seeds   runs of the best rate
    rounds  most extensions of a sweep
    draw    only write the table and the picture, of the runs that are there
    """

    data: str = ""
    size: str = "cpu"
    output: str = "outputs/optimizers"
    only: str = ""
    seeds: int = 3
    rounds: int = 3
    draw: str = ""


COMMON = (
    *(
        "recipe=quickstart",
        "data=text",
        "resume=none",
        "trainer.steps=null",
        "trainer.sample_prompt=null",
        "checkpoint.every=0",
    ),
    *("logging.progress=false", "schedule=wsd", "schedule.warmup=5%", "schedule.decay=20%", "trainer.eval_every=5%"),
    "data.validation=0.05",
)
SIZES = {
    "cpu": Size(
        (
            *("model.dim=64", "model.layers=3", "model.heads=2", "model.kv_heads=1", "model.ffn_dim=192", "precision=fp32"),
            *("data.seq_len=128", "data.vocabulary=1024", "batch.samples=16", "batch.micro=16", "trainer.eval_samples=256"),
        ),
        tokens=300 * 16 * 128,
        rank=16,
    ),
    "gpu": Size(
        (
            *("model.dim=768", "model.layers=12", "model.heads=12", "model.kv_heads=12", "model.ffn_dim=2048"),
            *("data.seq_len=1024", "data.vocabulary=4096", "batch.samples=64", "batch.micro=32", "trainer.eval_samples=256"),
            *("precision=bf16", "trainer.compile=true"),
        ),
        tokens=3000 * 64 * 1024,
        rank=192,
    ),
}


def sweeps(size: Size) -> dict[str, tuple[float, tuple[str, ...]]]:
    """Name of an optimizer → the middle rate of its first three, and its overrides."""
    rank = f"optim.rank={size.rank}"
    constant = "schedule=constant", "schedule.warmup=5%"
    return {
        "adamw": (4e-3, ("optim=adamw",)),
        "adamw_8bit": (4e-3, ("optim=adamw_8bit", "optim.block=64")),
        "muon": (8e-3, ("optim=muon",)),
        "normuon": (8e-3, ("optim=normuon",)),
        "soap": (4e-3, ("optim=soap", "optim.weight_decay=0.1")),
        "apollo": (8e-3, ("optim=apollo", rank)),
        "galore": (8e-3, ("optim=galore", rank)),
        "frugal": (4e-3, ("optim=frugal",)),
        "ademamix": (4e-3, ("optim=ademamix",)),
        "schedule_free": (8e-3, ("optim=schedule_free", *constant)),
        "lion": (5e-4, ("optim=lion",)),
    }


class Sweep:
    """One optimizer's runs, by rate and seed."""

    def __init__(self, name: str, size: Size, settings: Settings) -> None:
        self.name, self._size, self._settings = name, size, settings
        self._middle, self._overrides = sweeps(size)[name]
        self._steps = [-1, 0, 1]
        self._length = size.tokens

    def _rate(self, step: int) -> float:
        return self._middle * 2.0**step

    def _folder(self, step: int, seed: int) -> Path:
        return Path(self._settings.output) / f"{self.name}-{self._rate(step):g}-{seed}"

    def _line(self, step: int, seed: int) -> list[str]:
        data = f"data.input={Path(self._settings.data).resolve()}"
        mine = [*self._overrides, f"optim.lr={self._rate(step):g}", f"trainer.tokens={self._length}", f"seed={seed}"]
        common = [each for each in COMMON if not (each.startswith("schedule") and "schedule=constant" in self._overrides)]
        return [*common, *self._size.common, *mine, data, f"output_dir={self._folder(step, seed)}"]

    def pending(self, *, finish: bool) -> list[list[str]]:
        """List the command lines of runs to come: of the sweep, or of the best rate's other seeds. Extends the sweep."""
        if finish:
            best = self.best
            return [self._line(best, seed) for seed in range(2, self._settings.seeds + 1)] if best is not None else []
        best = self.best
        if best is not None and best in (min(self._steps), max(self._steps)):
            self._steps = sorted({*self._steps, best - 1, best + 1})
        return [self._line(step, 1) for step in self._steps if not (self._folder(step, 1) / FINISHED).exists()]

    @property
    def losses(self) -> dict[float, float]:
        """Rate → last validation loss of the first seed."""
        return {self._rate(step): evaluations[-1][1] for step in self._steps if (evaluations := read(self._folder(step, 1)))}

    @property
    def best(self) -> int | None:
        """The step of the best rate; None before there are runs."""
        done = {step: evaluations[-1][1] for step in range(-9, 10) if (evaluations := read(self._folder(step, 1)))}
        self._steps = sorted({*self._steps, *done})
        return min(done, key=lambda step: (math.isnan(done[step]), done[step])) if done else None

    def curves(self) -> tuple[float, list[Evaluations]]:
        """Return the best rate, and its evaluations for each seed that has finished."""
        best = self.best
        assert best is not None
        found = [read(self._folder(best, seed)) for seed in range(1, self._settings.seeds + 1)]
        return self._rate(best), [each for each in found if each]


def read(folder: Path) -> Evaluations:
    """Read the evaluations of a run; none if it has not finished."""
    if not (folder / FINISHED).exists():
        return []
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    tokens, found = 0, Evaluations()
    for row in rows:
        tokens = row.get("tokens", tokens)
        if "eval_loss" in row:
            found.append((tokens, row["eval_loss"]))
    return found


def table(found: Sequence[Sweep]) -> str:
    """Make a Markdown table: best rate, last loss of the seeds, tokens for AdamW's loss beside AdamW's."""
    lines = [
        "| `optim=` | best rate | validation loss (least to most of the seeds) | tokens to AdamW's loss | the sweep, by rate |",
        "|---|---|---|---|---|",
    ]
    adamw = next((sweep for sweep in found if sweep.name == "adamw"), None)
    goal = statistics.fmean(each[-1][1] for each in adamw.curves()[1]) if adamw else math.nan
    for sweep in found:
        rate, curves = sweep.curves()
        last = [each[-1][1] for each in curves]
        needed = reached(average(curves), goal)
        share = "not reached" if needed is None else f"{needed / curves[0][-1][0]:.0%}"
        spread = f"{statistics.fmean(last):.3f}" + (f" ({min(last):.3f} to {max(last):.3f})" if len(last) > 1 else "")
        swept = ", ".join(f"{rate:g}: {loss:.3f}" for rate, loss in sweep.losses.items())
        lines.append(f"| `{sweep.name}` | {rate:g} | {spread} | {share} | {swept} |")
    return "\n".join(lines)


def average(curves: Sequence[Evaluations]) -> Evaluations:
    """Average runs that were evaluated at the same points."""
    return [(points[0][0], statistics.fmean(loss for _, loss in points)) for points in zip(*curves, strict=True)]


def reached(evaluations: Evaluations, loss: float) -> float | None:
    """Return after how many tokens a loss was first reached, between evaluations linearly; None: never."""
    for (begin, above), (end, below) in itertools.pairwise(evaluations):
        if below <= loss:
            return begin + (end - begin) * (above - loss) / (above - below) if above > loss else begin
    return None


def draw(found: Sequence[Sweep], path: Path) -> None:
    """Draw the losses over tokens, and over rates."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for number, sweep in enumerate(found):
        style = {"label": sweep.name, "color": f"C{number % 10}", "linestyle": "-" if number < 10 else "--", "linewidth": 1.2}
        points = average(sweep.curves()[1])
        left.plot([tokens for tokens, _ in points], [loss for _, loss in points], **style)
        losses = sweep.losses
        right.plot(list(losses), list(losses.values()), marker="o", markersize=3, **style)
    last = [average(sweep.curves()[1])[-1][1] for sweep in found]
    for axes, name in ((left, "tokens"), (right, "learning rate")):
        axes.set(xlabel=name, ylabel="validation loss", ylim=(min(last) - 0.05, max(last) + 0.6))
        axes.grid(alpha=0.3)
    right.set_xscale("log")
    rates = sorted({rate for sweep in found for rate in sweep.losses})
    right.set_xticks(rates, [f"{rate:g}" for rate in rates], rotation=45)
    right.minorticks_off()
    left.legend(fontsize=8)
    figure.savefig(path, dpi=80)


def main() -> None:
    """Run the sweeps, tabulate and draw."""
    settings = arguments.read(Settings(), sys.argv[1:])
    size, folder = SIZES[settings.size], Path(settings.output)
    names = settings.only.split(",") if settings.only else list(sweeps(size))
    found = [Sweep(name, size, settings) for name in names]
    if not settings.draw:
        for number in range(settings.rounds + 2):
            lines = [line for sweep in found for line in sweep.pending(finish=number == settings.rounds + 1)]
            if lines:
                run_all([lines], folder)
    done = [sweep for sweep in found if sweep.best is not None]
    if done:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "table.md").write_text(table(done) + "\n")
        draw(done, folder / "optimizers.png")
        print(table(done))


if __name__ == "__main__":
    main()
