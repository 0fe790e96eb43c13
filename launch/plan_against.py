"""`meshloom plan --against outputs/run cluster=…`: what was predicted of a run, beside its metrics."""

from __future__ import annotations

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
from ..trainer.typed import replace_keys, typed_config
from .plan_cluster import launch_words, predict
from .planning import plan_of
from .run_metrics import steps_of

WARM_UP = 3
"""First steps of a run that are not counted."""


@dataclass(frozen=True)
class Measured:
    """Medians over a run's steps. memory: peak GiB of a GPU, where there is one."""

    seconds: float
    tokens_per_second: float
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
    config, problems = typed_config(node)  # pyright: ignore[reportArgumentType]
    if problems:
        raise ConfigError(problems)
    words = dict(word.split("=") for word in launch_words(cluster))
    config = replace_keys(config, {key: int(value) for key, value in words.items()})
    rows = steps_of(folder / "metrics.jsonl")
    if not rows:
        raise ConfigError([Problem("--against", f"{folder} has no steps in metrics.jsonl", "wait for the run's first steps")])
    counted = rows[min(WARM_UP, len(rows) - 1) :]
    plan = plan_of(config, ())
    memory = [row["memory_gib"] for row in counted if row.get("memory_gib") is not None]
    found = Measured(
        median(row["step_seconds"] for row in counted),
        median(row["tokens_per_second"] for row in counted) / plan.layout.world_size,
        max(memory) if memory else None,
        len(counted),
    )
    return predict(plan, config, replace(cluster, gpus=plan.layout.world_size), length), found


def against_table(predicted: Prediction, measured: Measured) -> Table:
    """Tabulate prediction and measurement."""
    title = f"Predicted and measured, medians of {measured.steps} steps"
    table = Table("", right("predicted"), right("measured"), right("off by"), title=title, title_justify="left", box=box.SIMPLE)
    rows = [
        ("a step", seconds(predicted.seconds), seconds(measured.seconds), predicted.seconds / measured.seconds),
        (
            "tokens/s a GPU",
            f"{predicted.tokens_per_second:,.0f}",
            f"{measured.tokens_per_second:,.0f}",
            predicted.tokens_per_second / measured.tokens_per_second,
        ),
    ]
    if measured.memory is not None:
        planned = predicted.bytes / GIB
        rows.append(("GiB of a GPU", f"{planned:.1f}", f"{measured.memory:.1f}", planned / measured.memory))
    for name, one, other, ratio in rows:
        table.add_row(name, one, other, f"{ratio - 1:+.1%}")
    return table
