"""Optimizers on real text, each at the best learning rate of a small sweep: validation loss over tokens.

    python benchmarks/optimizers_compared.py data=some/folder output=outputs/optimizers
    python benchmarks/optimizers_compared.py data=some/folder size=gpu output=outputs/optimizers
    python benchmarks/optimizers_compared.py data=some/shards size=gpu_short output=outputs/optimizers seconds=360
    python benchmarks/optimizers_compared.py output=outputs/optimizers draw=true

Every run is a `meshloom train` of its own, and all see the same tokens. A sweep begins with three rates, each twice the one
before. While the best is the lowest or the highest of them, a further rate is tried. The best is then run with more seeds.
With `seconds` runs follow PLAN instead, one after another, as long as another one fits in; then come more seeds.
Runs that are there are not run again. Written to the output folder: the runs, table.md and optimizers.png.
"""

from __future__ import annotations

import itertools
import json
import math
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path

import arguments
from many_runs import FINISHED, output, run, run_all

Evaluations = list[tuple[int, float]]
"""(tokens so far, validation loss) of a run."""


@dataclass(frozen=True)
class Size:
    """A size of the experiment.

    common  overrides of every run
    tokens  of every run
    rank    of low-rank optimizers: a quarter of the model's width
    vocabulary  of the tokenizer that is trained on a folder of text
    rates   factor on the middle rates of sweeps
    """

    common: tuple[str, ...]
    tokens: int
    rank: int
    vocabulary: int
    rates: float = 1.0


@dataclass
class Settings:
    """Arguments, as key=value.

    data    a folder of text, read whole, or the output of `meshloom data tokenize`
    size    a name of SIZES
    only    names of optimizers, separated by commas; "": all
    seeds   runs of the best rate
    rounds  most extensions of a sweep
    seconds of all runs by PLAN; 0: whole sweeps and seeds
    words   further words of every run, separated by blanks
    draw    only write the table and the picture, of the runs that are there
    """

    data: str = ""
    size: str = "cpu"
    output: str = "outputs/optimizers"
    only: str = ""
    seeds: int = 3
    rounds: int = 3
    seconds: float = 0.0
    words: str = ""
    draw: str = ""


COMMON = (
    *(
        "recipe=quickstart",
        "launch.nproc=1",
        "launch.check=false",
        "resume=none",
        "trainer.steps=null",
        "trainer.sample_prompt=null",
        "checkpoint.every=0",
    ),
    *("logging.progress=false", "schedule=wsd", "schedule.warmup=5%", "schedule.decay=20%", "trainer.eval_every=5%"),
)
VALIDATION = "data.validation=0.05"
WARM_UP = 20
"""Steps whose seconds are not counted."""
SIZES = {
    "cpu": Size(
        (
            *("model.dim=64", "model.layers=3", "model.heads=2", "model.kv_heads=1", "model.ffn_dim=192", "precision=fp32"),
            *("data.seq_len=128", "batch.samples=16", "batch.micro=16", "trainer.eval_samples=256"),
        ),
        tokens=300 * 16 * 128,
        rank=16,
        vocabulary=1024,
    ),
    "gpu": Size(
        (
            *("model.dim=768", "model.layers=12", "model.heads=12", "model.kv_heads=12", "model.ffn_dim=2048"),
            *("data.seq_len=1024", "batch.samples=64", "batch.micro=32", "trainer.eval_samples=256"),
            *("precision=bf16", "trainer.compile=true"),
        ),
        tokens=3000 * 64 * 1024,
        rank=192,
        vocabulary=4096,
    ),
}
SIZES["gpu_short"] = replace(
    SIZES["gpu"],
    common=(*SIZES["gpu"].common, "batch.samples=32", "trainer.eval_every=10%", "trainer.eval_samples=128"),
    tokens=384 * 32 * 1024,
    rates=0.25,
)
PLAN = (
    *(("adamw", 3), ("muon", 2), ("adamw_8bit", 1), ("muon", 3), ("normuon", 1), ("adamw_8bit", 2), ("normuon", 2)),
    *(("apollo", 1), ("frugal", 1), ("soap", 1), ("adamw", 4), ("muon", 4), ("apollo", 2), ("frugal", 2), ("soap", 2)),
    *(("apollo", 3), ("frugal", 3), ("soap", 3), ("normuon", 3), ("frugal", 4)),
)
"""(Optimizer, rates that it has been run at) in the order in which they are brought about while there is time."""
LIKE = {"adamw_8bit": "adamw", "normuon": "muon"}
"""Optimizer → another one, at whose best rate it begins under PLAN."""


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
        middle, self._overrides = sweeps(size)[name]
        self._middle = middle * size.rates
        self._steps = [-1, 0, 1]
        self._length = size.tokens

    def _rate(self, step: int) -> float:
        return self._middle * 2.0**step

    def _folder(self, step: int, seed: int) -> Path:
        return Path(self._settings.output) / f"{self.name}-{self._rate(step):g}-{seed}"

    def _line(self, step: int, seed: int) -> list[str]:
        path = Path(self._settings.data).resolve()
        shards = (path / "train/dataset.json").exists()
        text = ("data=text", VALIDATION, f"data.vocabulary={self._size.vocabulary}", f"data.input={path}")
        data = ("data=shards", f"data.path={path}") if shards else text
        mine = [*self._overrides, f"optim.lr={self._rate(step):g}", f"trainer.tokens={self._length}", f"seed={seed}"]
        common = [each for each in COMMON if not (each.startswith("schedule") and "schedule=constant" in self._overrides)]
        words = [*mine, *self._settings.words.split(), f"output_dir={self._folder(step, seed)}"]
        return [*data, *common, *self._size.common, *words]

    def pending(self, *, finish: bool) -> list[list[str]]:
        """List the command lines of runs to come: of the sweep, or of the best rate's other seeds. Extends the sweep."""
        if finish:
            best = self.best
            return [self._line(best, seed) for seed in range(2, self._settings.seeds + 1)] if best is not None else []
        best = self.best
        if best is not None and best in (min(self._steps), max(self._steps)):
            self._steps = sorted({*self._steps, best - 1, best + 1})
        return [self._line(step, 1) for step in self._steps if not (self._folder(step, 1) / FINISHED).exists()]

    def next_line(self, begin: int) -> list[str] | None:
        """Return the command line of a further rate: `begin` at first, then beside the best; None between two of them."""
        best = self.best
        tried = [step for step in range(-9, 10) if self._folder(step, 1).exists()]
        if not tried:
            return self._line(begin, 1)
        sides = [step for step in ((best or 0) + 1, (best or 0) - 1) if step not in tried]
        return self._line(sides[0], 1) if best is not None and sides else None

    @property
    def tried(self) -> int:
        """The number of rates with runs, also of those that failed."""
        return sum(self._folder(step, 1).exists() for step in range(-9, 10))

    @property
    def step_seconds(self) -> float:
        """Median of a step of the best rate's first seed, after the first ones."""
        best = self.best
        assert best is not None
        rows = [json.loads(line) for line in (self._folder(best, 1) / "metrics.jsonl").read_text().splitlines()]
        seconds = [row["step_seconds"] for row in rows if "step_seconds" in row]
        return statistics.median(seconds[WARM_UP:] or seconds)

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
    """Make a Markdown table: best rate, last loss of the seeds, tokens and seconds for AdamW's loss beside AdamW's.

    Seconds are tokens times a step's median seconds: where runs shared the machine they say nothing.
    """
    lines = [
        "| `optim=` | best rate | validation loss (least to most of the seeds) | tokens to AdamW's loss | ms a step |"
        " seconds to AdamW's loss | the sweep, by rate |",
        "|---|---|---|---|---|---|---|",
    ]
    adamw = next((sweep for sweep in found if sweep.name == "adamw"), None)
    goal = statistics.fmean(each[-1][1] for each in adamw.curves()[1]) if adamw else math.nan
    step = adamw.step_seconds if adamw else math.nan
    for sweep in found:
        rate, curves = sweep.curves()
        last = [each[-1][1] for each in curves]
        needed = reached(average(curves), goal)
        part = math.nan if needed is None else needed / curves[0][-1][0]
        share, time_share = (
            "not reached" if needed is None else f"{each:.0%}" for each in (part, part * sweep.step_seconds / step)
        )
        spread = f"{statistics.fmean(last):.3f}" + (f" ({min(last):.3f} to {max(last):.3f})" if len(last) > 1 else "")
        swept = ", ".join(f"{rate:g}: {loss:.3f}" for rate, loss in sweep.losses.items())
        lines.append(
            f"| `{sweep.name}` | {rate:g} | {spread} | {share} | {1000 * sweep.step_seconds:.1f} | {time_share} | {swept} |"
        )
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


def run_plan(found: dict[str, Sweep], folder: Path, seconds: float) -> None:
    """Run by PLAN in one process, as long as another run is likely to end in time. After a failure the process is replaced."""
    end, expected = time.monotonic() + seconds, 0.0
    folder.mkdir(parents=True, exist_ok=True)
    pool: ProcessPoolExecutor | None = None
    while (line := next_planned(found)) is not None and end - time.monotonic() > expected:
        began = time.monotonic()
        pool = pool or ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), redirect, (folder / "runs.log",))
        output(line).mkdir(parents=True)  # tried, even if it fails before it has written anything
        try:
            ended_well = pool.submit(run, line).result()
        except BrokenProcessPool:
            ended_well = False
        if not ended_well:
            pool.shutdown(wait=False)
            pool = None
        expected = 1.1 * (time.monotonic() - began)
        print(f"{output(line).name}: {'done' if ended_well else 'failed'}, {time.monotonic() - began:.0f} s", flush=True)
    if pool is not None:
        pool.shutdown()


def next_planned(found: dict[str, Sweep]) -> list[str] | None:
    """Return the command line of the next run: by PLAN, then one more seed of each best rate in turn; None: all are there."""
    for name, number in PLAN:
        if name in found and found[name].tried < number:
            model = found.get(LIKE.get(name, ""))
            begin = model.best if model is not None else None
            if (line := found[name].next_line(begin or 0)) is not None:
                return line
    seeds = [line for sweep in found.values() for line in sweep.pending(finish=True) if not output(line).exists()]
    return min(seeds, key=seed_of) if seeds else None


def seed_of(line: Sequence[str]) -> int:
    """Read a command line's seed."""
    return next(int(word.removeprefix("seed=")) for word in line if word.startswith("seed="))


def redirect(log: Path) -> None:
    """Append what this process prints to a file."""
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def main() -> None:
    """Run the sweeps, tabulate and draw."""
    settings = arguments.read(Settings(), sys.argv[1:])
    size, folder = SIZES[settings.size], Path(settings.output)
    names = settings.only.split(",") if settings.only else list(sweeps(size))
    found = [Sweep(name, size, settings) for name in names]
    if not settings.draw and settings.seconds:
        run_plan({sweep.name: sweep for sweep in found}, folder, settings.seconds)
    elif not settings.draw:
        for number in range(settings.rounds + 2):
            lines = [line for sweep in found for line in sweep.pending(finish=number == settings.rounds + 1)]
            if lines:
                run_all([lines], folder)
    done = [sweep for sweep in found if sweep.best is not None]
    if done:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "table.md").write_text(table(done) + "\n")
        print(table(done), flush=True)
        draw(done, folder / "optimizers.png")


if __name__ == "__main__":
    main()
