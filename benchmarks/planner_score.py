"""Score predicted times against published tables and against our own measured runs.

    python benchmarks/planner_score.py                  every table
    python benchmarks/planner_score.py megascale -v     one of them, row by row; -p: with the parts of each step
    python benchmarks/planner_score.py pairs=5          with five random pairs of rows instead of the fixed one
    python benchmarks/planner_score.py rows=rows.json   the rows that planner_rows.py measured on a GPU: time and memory
    python benchmarks/planner_score.py works=works_h200.csv   works of other benchmarks on an H200, with nothing fitted

Of each table two rows calibrate one rate (`cluster.rates.speed`), and the others are scored; a constant MFU from the same two
rows stands beside. The rows that calibrate stand at one and at two thirds of the file's order. The error is
of tokens/s: |predicted / published − 1|. `planner/published.csv` has the rows, `planner/README.md` their sources.
"""

# pyright: reportMissingImports=false, reportUnknownLambdaType=false, reportUnknownParameterType=false

from __future__ import annotations

import csv
import json
import math
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import yaml

from meshloom.config.compose import RECIPE_FOLDER
from meshloom.models.config import DecoderConfig
from meshloom.models.costs import flops_per_token
from meshloom.optim.optimizers.config import AdamWConfig
from meshloom.parallel.config import ParallelConfig
from meshloom.parallel.layout import Layout
from meshloom.planner.cluster import ClusterConfig, Rates, load_cluster, recipes
from meshloom.planner.cost import layout_cost
from meshloom.planner.engines import engine_cost
from meshloom.planner.memory import Job, optimizer_bytes
from meshloom.planner.offload import OffloadAccount
from meshloom.planner.parameters import decoder_inventory
from meshloom.planner.software import COMPILED, EAGER, Software
from meshloom.planner.step_time import Step, StepTime, step_time

if TYPE_CHECKING:
    import planner_rows

HERE = Path(__file__).parent / "planner"
MIXTURES = ("gpt_oss_20b", "qwen3_30b_a3b", "qwen3_235b_a22b", "deepseek_v3")
"""Models of the tables that are recipes."""

SOFTWARE = {
    "mpt": Software(recomputes_last=True, passes=2.6, launches=2.5),
    "megatron2021": Software(recomputes_last=True, passes=1.8, flash=False, reduces_late=True),
    "megatron2022": Software(recomputes_last=True, passes=1.8, flash=False, reduces_late=True),
    "megatron2022sp": Software(recomputes_last=True, passes=1.8, flash=False, selective="attention", reduces_late=True),
    "megatron2023": Software(recomputes_last=True, passes=1.8, flash=False, selective="attention", reduces_late=True),
    "megascale": Software(recomputes_last=True, passes=1.2, selective="attention", tensor_overlap=0.6),
    "titan_eager": replace(EAGER, selective="products"),
    "titan": replace(COMPILED, selective="products"),
    "titan_async": replace(COMPILED, selective="products", tensor_overlap=0.6),
    **dict.fromkeys(
        ("megatron2025_09", "megatron2025", "megatron2026"),
        Software(recomputes_last=True, float8_experts=True, passes=1.2, tensor_overlap=0.6),
    ),
}
"""Versions and settings of the programs behind the tables, as far as they are known."""

FLASH_1 = {"a100": ["cluster.rates.attention=0.33", "cluster.rates.attention_backward=0.30"]}
FLASH_1["h100"] = ["cluster.rates.attention=0.20", "cluster.rates.attention_backward=0.18"]
CLUSTERS: dict[str, list[str]] = {
    "mpt_h100": ["h100", *FLASH_1["h100"]],
    "mpt_a100_80": ["a100", *FLASH_1["a100"]],
    "mpt_a100_40": ["a100", "cluster.bandwidth=1.555", *FLASH_1["a100"]],
    # FlashAttention 2 on a Hopper GPU (arXiv 2407.08608, figures 5 and 6), HBM2e.
    "megatron_bridge": ["h100"],
    "megatron_bridge_moe": ["h100"],
    "torchtitan": ["h100", "cluster.bandwidth=2.4", "cluster.rates.attention=0.40", "cluster.rates.attention_backward=0.31"],
}


APART = ("megatron_sc21", "megatron_bridge_moe")
"""Tables that are not counted with the others: SC'21 does not tell the micro-batch, which is taken to be 1; Megatron-Bridge
computes experts in float8 and hides their exchanges, which Meshloom does not do."""


@dataclass(frozen=True)
class Row:
    """A published row: what ran, and tokens per second and GPU. work: what rows that differ by layout alone have in common."""

    work: tuple[str, ...]
    step: Callable[[float], Step]
    published: float
    name: str
    tokens: float

    def seconds(self, speed: float) -> StepTime:
        """Predict a step with this speed of kernels."""
        return step_time(self.step(speed))

    def rate(self, speed: float) -> float:
        """Predict tokens per second and GPU."""
        step = self.step(speed)
        return self.tokens / self.seconds(speed).seconds / step.layout.world_size

    def flops_per_token(self) -> float:
        """Count FLOPs by the convention of MFU."""
        step = self.step(1.0)
        return flops_per_token(step.model, step.job.seq_len)


def models() -> dict[str, DecoderConfig]:
    """Read the shapes of the models in the tables."""
    found: dict[str, DecoderConfig] = {}
    for row in csv.DictReader((HERE / "models.csv").open()):
        dim, ffn, gated = int(row["dim"]), int(row["ffn_dim"]), row["gated"] == "1"
        found[row["model"]] = DecoderConfig(
            dim=dim,
            layers=int(row["layers"]),
            heads=int(row["heads"]),
            kv_heads=int(row["kv_heads"]),
            ffn_dim=ffn if gated else ffn * 2 // 3,  # two matrices of one width have as many elements as three of this
            vocabulary=int(row["vocabulary"]),
            tied=row["tied"] == "1",
        )
    for name in MIXTURES:
        keys = yaml.safe_load((RECIPE_FOLDER / "model" / f"{name}.yaml").read_text())
        found[name] = DecoderConfig.of({key: value for key, value in keys.items() if key != "defaults"})
    small = found["gpt_oss_20b"]
    found["gpt_oss_120b"] = replace(small, layers=36, experts=replace(small.experts, count=128))
    return found


def made(
    model: DecoderConfig, values: dict[str, Any], software: Software | None, clusters: Callable[[float], ClusterConfig]
) -> Callable[[float], Step]:
    """Return speed → the step of a row."""
    number = {name: int(values[name]) for name in ("seq", "gpus", "batch", "tp", "pp", "cp", "zero")}
    chunks = int(values.get("chunks", 1))
    parallel = ParallelConfig(
        engine=values.get("engine", "torch"),
        zero=number["zero"], tp=number["tp"], pp=number["pp"], cp=number["cp"],
        cp_kind=values.get("cp_kind", "ring"),
        ep=int(values.get("ep") or 1),
        schedule="interleaved" if chunks > 1 else "1f1b",
        stages_per_rank=chunks if chunks > 1 else None,
        sequence_parallel=values.get("software") not in ("megatron2021", "megatron2022"),
        copy_engines="engine" in values,
    )  # fmt: skip
    layout = Layout.plan(parallel, number["gpus"])
    micro = int(values["micro"] or 1)
    many = max(1, -(-number["batch"] // (layout.data_size * micro)))
    compiled = values.get("compile", "1") == "1" and values.get("software") != "titan_eager"
    job = Job(
        number["seq"], micro, many, "bf16", [values["policy"]] * model.layers, compiled,
        fused=values.get("fused") == "1", float8=values["float8"],
    )  # fmt: skip
    inventory = decoder_inventory(model)
    optimizer = optimizer_bytes(AdamWConfig())
    assert optimizer is not None
    cost = layout_cost(inventory, parallel, layout, job, optimizer)
    ranks, away = zip(*(engine_cost(rank, inventory, parallel, layout, job) for rank in cost.ranks), strict=True)
    cost = replace(cost, ranks=list(ranks))
    return lambda speed: Step(model, parallel, layout, job, cost, away[0], clusters(speed), software=software)


def published(table: str) -> list[Row]:
    """Read the rows of a table."""
    shapes, found = models(), list[Row]()
    for values in csv.DictReader((HERE / "published.csv").open()):
        if values["table"] != table:
            continue
        name, *changes = CLUSTERS.get(table, ["a100"])
        words = [f"cluster={name}x{max(8, int(values['gpus']))}", *changes]
        step = made(shapes[values["model"]], values, SOFTWARE[values["software"]], clustered(words))
        tokens = int(values["batch"]) * int(values["seq"])
        told = [values[key] for key in ("model", "seq", "gpus", "batch", "micro", "tp", "pp", "policy", "float8", "software")]
        work = tuple(values[key] for key in ("table", "model", "seq", "gpus", "batch", "float8"))
        found.append(Row(work, step, float(values["tokens_per_s_gpu"]), " ".join(told), tokens))
    return found


def clustered(words: Sequence[str]) -> Callable[[float], ClusterConfig]:
    """Return speed → the cluster of these words."""
    base = load_cluster(words)
    return lambda speed: replace(base, rates=replace(base.rates, speed=speed))


def measured() -> list[Row]:
    """Our own runs on H200."""
    found: list[Row] = []
    for values in csv.DictReader((HERE / "measured.csv").open()):
        keys = yaml.safe_load((RECIPE_FOLDER / "model" / f"{values['model']}.yaml").read_text())
        model = DecoderConfig.of({key: value for key, value in keys.items() if key != "defaults"})
        step = made(model, values, None, clustered(["cluster=h200x8"]))
        told = [values[key] for key in values if key not in ("tokens_per_s_gpu", "source", "seq")]
        work = tuple(values[key] for key in ("model", "seq", "gpus", "float8"))
        tokens = int(values["batch"]) * int(values["seq"])
        found.append(Row(work, step, float(values["tokens_per_s_gpu"]), " ".join(told), tokens))
    return found


UNSTEADY = 1.05
"""Median step of a work over its fastest, above which something disturbed it: then it is scored apart."""


def score_own(path: Path) -> None:
    """Score rows of `planner_rows.py`: every second one fits the speed, the others are scored; memory of all of them.

    Rows that are not counted, in float8 or with unsteady steps, keep their place in that order.
    """
    import planner_rows

    told = json.loads(path.read_text())
    words = {name: value for name, value in told["cluster"].items() if name not in ("rates", "nics", "islands")}
    calibrated = replace(ClusterConfig(**words), rates=Rates(**told["cluster"]["rates"]))
    sheet = next((name for name in recipes() if name.upper() in calibrated.gpu.upper()), "h100")
    names = [field.name for field in fields(planner_rows.Work)]
    measured = [row for row in told["rows"] if "failed" not in row]
    for row in told["rows"]:
        if "failed" in row:
            print(f"failed: {row['model']} {row['seq']}: {row['failed']}")
    for label, base in (("as calibrated", calibrated), ("data sheet", load_cluster([f"cluster={sheet}"]))):
        rows: list[Row] = []
        for values in measured:
            work = planner_rows.Work(**{name: values[name] for name in names})
            kernels = bool(values["fused"]), values.get("fused_experts")
            step = own_step(work, planner_rows.shape_of(work), *kernels, base)
            name = " ".join(str(values[key]) for key in names)
            rows.append(Row((name,), step, values["tokens_per_s_gpu"], name, work.micro * work.many * work.seq))
        steady = [values["seconds"] <= UNSTEADY * values["least"] for values in measured]
        speed = base.rates.speed
        bf16 = [values["float8"] == "none" for values in measured]
        for which, counted in (("bf16 rows", bf16), ("all rows", [True] * len(rows)), ("steady rows", steady)):
            used, scored = ([row for at, row in enumerate(rows) if counted[at] and at % 2 == half] for half in (0, 1))
            speed = fitted(used)
            for how, each in (("one speed fitted to every second row", speed), ("nothing fitted", base.rates.speed)):
                off = [row.rate(each) / row.published - 1 for row in scored]
                print(f"{label}, {which}, {how} ({each:.3f}): {len(scored)} rows, median p90 worst {spread(off)}")
            both = [row.rate(base.rates.speed) / row.published - 1 for row in (*used, *scored)]
            print(f"  nothing fitted, both halves: {len(both)} rows {spread(both)}")
            constant = math.exp(sum(math.log(row.published * row.flops_per_token()) for row in used) / len(used))
            off = [constant / row.flops_per_token() / row.published - 1 for row in scored]
            print(f"  constant MFU from the same rows: {spread(off)}")
        for at, row in enumerate(rows):
            mark = ("fit  " if at % 2 == 0 else "score") if steady[at] else "apart"
            values = measured[at]
            errors_of = (row.rate(each) / row.published - 1 for each in (speed, base.rates.speed))
            line = f"  {mark} {row.name:<52} {row.published:9.0f} " + " ".join(f"{error:+7.1%}" for error in errors_of)
            if "allocated_gib" in values:
                planned = row.step(1.0).cost.ranks[0].total / 2**30
                line += f"   {values['allocated_gib']:6.1f} GiB {planned / values['allocated_gib'] - 1:+7.1%}"
            print(line)


def score_works(path: Path) -> None:
    """Print how far planned seconds of works on an H200 are off.

    Passes are a step without its update and its copies of weights and gradients. Documents are told by their mean length.
    """
    import planner_rows

    names = [field.name for field in fields(planner_rows.Work)]
    for values in csv.DictReader(path.open()):
        numbers = {name: int(values[name]) for name in ("layers", "seq", "micro", "many")}
        work = planner_rows.Work(values["model"], policy=values["policy"], **numbers)
        kernels = values["fused"] == "1", values["fused_experts"] == "1"
        step = own_step(work, planner_rows.shape_of(work), *kernels, load_cluster(["cluster=h200"]))(1.0)
        parts = step_time(replace(step, length=float(values["length"]))).parts
        left_out = ("update", "copies of weights and gradients") if values["timed"] == "passes" else ()
        planned = sum(seconds for name, seconds in parts.items() if name not in left_out)
        seconds = float(values["seconds"])
        told = " ".join(str(getattr(work, name)) for name in names)
        line = f"{told:<40} documents {values['length']:>6} {values['timed']:<7}{seconds:8.4f} s planned {planned:8.4f}"
        line += f" {planned - seconds:+8.4f} s, speed {seconds / planned - 1:+6.1%}"
        if values["allocated_gib"]:
            line += f"   {values['allocated_gib']} GiB planned {step.cost.ranks[0].total / 2**30:.1f}"
        print(line)


def own_step(
    work: planner_rows.Work, model: DecoderConfig, fused: bool, fused_experts: bool | None, base: ClusterConfig
) -> Callable[[float], Step]:
    """Return speed → the step of a measured work, on one GPU. fused, fused_experts: see `Job`."""
    parallel, layout = ParallelConfig(zero=1), Layout()
    job = Job(
        work.seq, work.micro, work.many, "bf16", [work.policy] * work.layers, work.compile,
        fused=fused, fused_experts=fused_experts, float8=work.float8,
    )  # fmt: skip
    optimizer = optimizer_bytes(AdamWConfig())
    assert optimizer is not None
    cost = layout_cost(decoder_inventory(model), parallel, layout, job, optimizer)
    return lambda speed: Step(
        model, parallel, layout, job, cost, OffloadAccount(),
        replace(base, gpus=1, rates=replace(base.rates, speed=speed)),
    )  # fmt: skip


def fitted(rows: Sequence[Row]) -> float:
    """Find the speed with which the mean logarithmic error of these rows is 0."""
    low, high = 0.05, 4.0
    for _ in range(14):
        middle = math.sqrt(low * high)
        error = sum(math.log(row.rate(middle) / row.published) for row in rows)
        low, high = (middle, high) if error < 0 else (low, middle)
    return math.sqrt(low * high)


def errors(rows: Sequence[Row], used: Sequence[Row]) -> tuple[float, list[float], list[float]]:
    """Return the fitted speed, and the errors of the model and of a constant MFU on the rows that were not used."""
    speed = fitted(used)
    constant = math.exp(sum(math.log(row.published * row.flops_per_token()) for row in used) / len(used))
    left = [row for row in rows if row not in used]
    ours = [row.rate(speed) / row.published - 1 for row in left]
    theirs = [constant / row.flops_per_token() / row.published - 1 for row in left]
    return speed, ours, theirs


def quantile(values: Sequence[float], share: float) -> float:
    """Return the value below which this share lies."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, math.ceil(share * len(ordered)) - 1)]


def spread(values: Sequence[float]) -> str:
    """Word median, p90 and worst."""
    sizes = [abs(value) for value in values]
    return f"{median(sizes):6.1%} {quantile(sizes, 0.9):6.1%} {max(sizes):6.1%}"


def choices(rows: Sequence[Row], speed: float) -> list[float]:
    """Return, for each work that is published in several layouts, how far the predicted best is behind the published best."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(row.work, []).append(row)
    several = [group for group in found.values() if len(group) > 1]
    chosen = [max(group, key=lambda row: row.rate(speed)) for group in several]
    return [1 - row.published / max(each.published for each in group) for row, group in zip(chosen, several, strict=True)]


def score_pairs(names: Sequence[str], count: int) -> None:
    """Print the scores of tables calibrated by random pairs of rows: how much the choice of the two matters."""
    tables = list(dict.fromkeys(row["table"] for row in csv.DictReader((HERE / "published.csv").open())))
    draw = random.Random(1)
    ours, theirs = list[float](), list[float]()
    for table in [table for table in tables if table not in APART and (not names or table in names)]:
        rows = published(table)
        for _ in range(count):
            _, mine, constant = errors(rows, draw.sample(rows, 2))
            ours += mine
            theirs += constant
    print(f"{count} random pairs of rows a table, {len(ours)} errors: model {spread(ours)}, constant MFU {spread(theirs)}")


def main(argv: Sequence[str]) -> None:
    """Print the scores of all tables, or of those named."""
    own = next((word.partition("=")[2] for word in argv if word.startswith("rows=")), None)
    if own is not None:
        score_own(Path(own))
        return
    works = next((word.partition("=")[2] for word in argv if word.startswith("works=")), None)
    if works is not None:
        score_works(Path(works))
        return
    names = [word for word in argv if not word.startswith(("-", "pairs="))]
    pairs = next((int(word.partition("=")[2]) for word in argv if word.startswith("pairs=")), 0)
    if pairs:
        score_pairs(names, pairs)
        return
    tables = list(dict.fromkeys(row["table"] for row in csv.DictReader((HERE / "published.csv").open())))
    print(f"{'table':<22}{'rows':>4} {'speed':>6}   median p90 worst: model, constant MFU")
    every: list[float] = []
    other: list[float] = []
    behind: list[float] = []
    for table in [*tables, "measured"]:
        if names and table not in names:
            continue
        rows = measured() if table == "measured" else published(table)
        used = rows[::2] if table == "measured" else [rows[len(rows) // 3], rows[2 * len(rows) // 3]]
        speed, ours, theirs = errors(rows, used)
        print(
            f"{table + (' (apart)' if table in APART else ''):<22}{len(ours):>4} {speed:6.3f}   "
            f"{spread(ours)}   {spread(theirs)}"
        )
        if table not in (*APART, "measured"):
            every += ours
            other += theirs
        if table not in APART:
            behind += choices(rows, speed)
        if "-v" in argv:
            left = [row for row in rows if row not in used]
            for row, error, constant in zip(left, ours, theirs, strict=True):
                print(f"    {row.name:<62} {row.published:9.1f} {error:+7.1%} {constant:+7.1%}")
                if "-p" in argv:
                    parts = row.seconds(speed).parts
                    whole = sum(parts.values())
                    print("        " + ", ".join(f"{name} {value / whole:.0%}" for name, value in parts.items()))
    if behind:
        near = sum(each <= 0.05 for each in behind)
        print(f"of {len(behind)} works in several layouts the predicted best is within 5 % of the best for {near}")
    if every:
        print(f"{'published, all':<22}{len(every):>4}          {spread(every)}   {spread(other)}")


if __name__ == "__main__":
    main(sys.argv[1:])
