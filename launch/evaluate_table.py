"""Tables of `meshloom evaluate` for a terminal."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from .table import aligned

if TYPE_CHECKING:
    from ..trainer.evaluate import EvaluationResult
    from ..trainer.tasks.on_checkpoint import TasksResult


def loss_table(result: EvaluationResult) -> str:
    """Lay out the result for a terminal: a line of each source, and of all where there are several."""
    rows = [["source", "weight", "samples", "tokens", "loss", "perplexity", "bits per byte"]]
    for each in result.sources:
        row = each.as_json()
        numbers = [_number(row[name]) for name in ("loss", "perplexity", "bits_per_byte")]
        weight = f"{each.weight:.3g}" if each.weight else "apart"
        rows.append([each.name, weight, f"{each.samples:,}", f"{each.tokens:,}", *numbers])
    if len(result.sources) > 1:
        whole = result.as_json()
        rows.append(["mean", "", "", "", *(_number(whole[name]) for name in ("loss", "perplexity", "bits_per_byte"))])
    head = f"{result.checkpoint}: step {result.step}, {result.precision}, {result.layout}"
    return "\n".join([head, *aligned(rows)])


def task_table(result: TasksResult) -> str:
    """Lay out the result for a terminal: a line of each metric. An arrow shows in which direction it is better."""
    rows = [["task", "version", "shots", "questions", "metric", "", "value", "error"]]
    for each in result.values:
        metric = each.metric if each.filter == "none" else f"{each.metric} ({each.filter})"
        arrow = {True: "↑", False: "↓", None: ""}[each.higher]
        counts = ["" if count is None else f"{count:,}" for count in (each.shots, each.samples)]
        error = "" if each.error is None or math.isnan(each.error) else f"±{each.error:.4f}"
        rows.append([each.task, each.version, *counts, metric, arrow, _number(each.value), error])
    processes = "one process" if result.processes == 1 else f"{result.processes} processes"
    about = f"step {result.step}, {result.precision}, context of {result.context:,} tokens, {processes}"
    return "\n".join([f"{result.checkpoint}: {about}", *aligned(rows)])


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}" if value < 1e5 else f"{value:.4g}"
