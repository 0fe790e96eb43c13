"""`meshloom plan --against outputs/run cluster=…`: what was predicted of a run, beside its metrics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich import box
from rich.table import Table

from ..config.problems import ConfigError, Problem
from ..planner.cluster import GIB, ClusterConfig
from ..planner.prediction import Prediction
from ..planner.tables import right
from ..planner.time_tables import seconds
from ..trainer.identity import METRICS
from ..trainer.resumed_config import saved_config
from ..trainer.typed import replace_keys, typed_config
from .plan_cluster import launch_words, predict
from .planning import plan_of
from .run_metrics import Metrics

MEASURED = ("step_seconds", "tokens_per_second")
WARM_UP = 3
"""First steps of a run that are not counted."""


@dataclass(frozen=True)
class Measured:
    """Medians over a run's steps; None of what its rows do not have, as those of older versions.

    memory   peak GiB of a GPU, where there is one
    """

    seconds: float | None
    tokens_per_second: float | None
    memory: float | None
    steps: int


def against(folder: Path, cluster: ClusterConfig, length: float | None = None) -> tuple[Prediction, Measured]:
    """Predict the run of a folder on as many GPUs as the cluster has. Raises ConfigError for a folder without a run.

    length: mean tokens of a document that attention stays inside
    """
    file = folder / "config.yaml"
    try:
        node = OmegaConf.load(file)
    except (OSError, OmegaConfBaseException, ValueError) as error:
        raise ConfigError([Problem("--against", f"{file} can't be read: {error}", "give a run's folder")]) from error
    config, problems = typed_config(OmegaConf.create(saved_config({"config": OmegaConf.to_container(node)})))
    if problems:
        raise ConfigError(problems)
    words = dict(word.split("=") for word in launch_words(cluster))
    config = replace_keys(config, {key: int(value) for key, value in words.items()})
    by_step = {row["step"]: row for row in Metrics.read(folder / METRICS).rows if any(name in row for name in MEASURED)}
    rows = [by_step[step] for step in sorted(by_step)]
    if not rows:
        text = f"{folder} has no steps with {' or '.join(MEASURED)} in {METRICS}"
        raise ConfigError([Problem("--against", text, "wait for the run's first steps, or give a run that measured them")])
    counted = rows[min(WARM_UP, len(rows) - 1) :]
    plan = plan_of(config, ())
    numbers = {name: [row[name] for row in counted if row.get(name) is not None] for name in (*MEASURED, "memory_gib")}
    rates = [rate / plan.processes for rate in numbers["tokens_per_second"]]
    found = Measured(
        median(numbers["step_seconds"]) if numbers["step_seconds"] else None,
        median(rates) if rates else None,
        max(numbers["memory_gib"], default=None),
        len(counted),
    )
    return predict(plan, config, replace(cluster, gpus=plan.processes), length), found


def against_table(predicted: Prediction, measured: Measured) -> Table:
    """Tabulate prediction and measurement, of what the run has measured."""
    title = f"Predicted and measured, medians of {measured.steps} steps"
    table = Table("", right("predicted"), right("measured"), right("off by"), title=title, title_justify="left", box=box.SIMPLE)
    rows: list[tuple[str, Callable[[float], str], float, float | None]] = [
        ("a step", seconds, predicted.seconds, measured.seconds),
        ("tokens/s a GPU", "{:,.0f}".format, predicted.tokens_per_second, measured.tokens_per_second),
        ("GiB of a GPU", "{:.1f}".format, predicted.bytes / GIB, measured.memory),
    ]
    for name, shown, one, other in rows:
        if other is not None:
            table.add_row(name, shown(one), shown(other), f"{one / other - 1:+.1%}")
    return table


def not_compared(measured: Measured) -> str:
    """Return a line that names the numbers which a run's rows lack; "" if they lack none."""
    found = {"step_seconds": measured.seconds, "tokens_per_second": measured.tokens_per_second}
    lacking = [name for name in MEASURED if found[name] is None]
    return f"not compared: {METRICS} has no {' and no '.join(lacking)}" if lacking else ""
