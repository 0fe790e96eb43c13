"""The charts of a report, drawn by matplotlib: one figure for each question."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...config.lazy import numpy as np
from ..run_metrics import Metrics, is_source_loss, is_task
from .curves import AXES, curve, positions
from .figure import ALARM, COLOURS, NAMED, WIDE, Picture, Runs, colour, coloured, drawn, finish, line, log_scale, shown_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SAVE_TIMES = (("total_seconds", "from begin to commit", "o"), ("stall_seconds", "training waited", "v"))
"""The times of a save that are drawn: number, name, marker."""
NOT_FINITE = "loss not finite"
INCIDENT_MARKERS = ("v", "s", "D", "^", "P", "*", "<", ">")
EXACT = ("lr", "batch_samples")
"""Numbers that are set, and not measured."""
LOG_FROM = 4.0
"""Ratio of the highest to the lowest loss from which its axis is logarithmic."""


@dataclass(frozen=True)
class NumberChart:
    """A chart of one number of the steps. log: whether its axis may be logarithmic."""

    name: str
    title: str
    number: str
    unit: str = ""
    log: bool = False


NUMBER_CHARTS = (
    NumberChart("lr", "Learning rate", "lr"),
    NumberChart("batch", "Batch size", "batch_samples", "samples"),
    NumberChart("grad_norm", "Gradient norm, before clipping", "grad_norm", log=True),
    NumberChart("noise", "Gradient noise scale", "noise_scale", "samples", log=True),
    NumberChart("throughput", "Throughput", "tokens_per_second", "tokens/s"),
    NumberChart("mfu", "Model FLOPs utilisation", "mfu", "share of the peak"),
)


@dataclass(frozen=True)
class Marks:
    """Steps of a run at which something happened, by what it was."""

    steps: Mapping[str, Sequence[int]]


def all_charts(runs: Runs, marks: Mapping[str, Marks], *, png: bool) -> Iterator[Picture]:
    """Draw every chart for which some run has numbers."""
    if has(runs, "loss", "eval_loss"):
        for axis, label in AXES.items():
            yield loss_chart(runs, axis, f"Loss by {label}", marks if axis == "step" else {}, png=png)
    yield from evaluation_charts(runs, png=png)
    for chart in NUMBER_CHARTS:
        if has(runs, chart.number):
            yield number_chart(runs, chart, png=png)
    if has(runs, "memory_gib"):
        yield memory_chart(runs, png=png)
    if has(runs, "checkpoint/total_seconds"):
        yield save_chart(runs, png=png)


def has(runs: Runs, *numbers: str) -> bool:
    """Return whether some run has one of these numbers."""
    return any(number in metrics.names for metrics in runs.values() for number in numbers)


def loss_chart(runs: Runs, axis: str, title: str, marks: Mapping[str, Marks], *, png: bool) -> Picture:
    """Draw training losses (light: of each step; bold: averaged) and validation losses (dots) along an axis."""

    def draw(axes: Axes) -> None:
        for name, metrics, hue in coloured(runs):
            train, held_out = curve(metrics, "loss", axis), curve(metrics, "eval_loss", axis)
            label = shown_name(name, runs) or "training"
            if len(train):
                line(axes, train, runs, color=hue, alpha=0.35, linewidth=0.8)
                line(axes, train.smoothed(), runs, color=hue, label=label)
            if len(held_out):
                known = len(runs) > 1 and len(train) > 0  # its colour is in the legend
                more: dict[str, Any] = {} if known else {"label": "validation" if len(runs) == 1 else label}
                held_colour = COLOURS[1] if len(runs) == 1 else hue
                size = 4 if len(held_out) < 60 else 0
                line(axes, held_out, runs, color=held_colour, marker="o", markersize=size, linewidth=1, linestyle="--", **more)
        _loss_scale(axes, runs)
        kinds = dict.fromkeys(kind for each in marks.values() for kind in each.steps)
        markers = {NOT_FINITE: "x"} | dict(zip(kinds, itertools.cycle(INCIDENT_MARKERS), strict=False))
        for name, metrics in runs.items():
            happened = marks[name].steps if name in marks else {}
            _mark_steps(axes, metrics, axis, {NOT_FINITE: _without_loss(metrics), **happened}, markers)
        finish(axes, axis, "loss", runs, legend=True)

    return drawn(f"loss_by_{axis}", title, draw, WIDE, png=png)


def evaluation_charts(runs: Runs, *, png: bool) -> Iterator[Picture]:
    """Draw the validation loss of each source and named set, and the results of benchmark tasks: a chart for each metric."""
    names = list(dict.fromkeys(name for metrics in runs.values() for name in metrics.names))
    sources = {name: name.removeprefix("validation/").removesuffix("/loss") for name in names if is_source_loss(name)}
    if sources:
        yield _lines_chart(runs, "validation_by_source", "Validation loss by source", sources, "validation loss", png=png)
    tasks: dict[str, dict[str, str]] = {}
    for name in filter(is_task, names):
        _, task, metric = name.split("/", 2)
        tasks.setdefault(metric, {})[name] = task
    for metric, known in tasks.items():
        yield _lines_chart(runs, f"tasks_{metric.replace('/', '_')}", f"Tasks: {metric}", known, metric, png=png)


def _lines_chart(runs: Runs, name: str, title: str, labels: Mapping[str, str], ylabel: str, *, png: bool) -> Picture:
    """Draw some numbers of evaluations. labels: number → its name in the legend."""

    def draw(axes: Axes) -> None:
        lines = [(f"{run} " * (len(runs) > 1), number, metrics) for run, metrics in runs.items() for number in labels]
        for at, (run, number, metrics) in enumerate(lines):
            found = curve(metrics, number)
            label = run + labels[number] if len(lines) <= NAMED else None
            line(axes, found, runs, color=colour(at, len(lines)), marker="o", markersize=3, label=label)
        finish(axes, "step", ylabel, runs)

    return drawn(name, title, draw, png=png)


def number_chart(runs: Runs, chart: NumberChart, *, png: bool) -> Picture:
    """Draw one number of the steps: what was set as it was, what was measured also averaged."""
    number = chart.number

    def draw(axes: Axes) -> None:
        for run, metrics, hue in coloured(runs):
            found, label = curve(metrics, number), shown_name(run, runs)
            if number in EXACT:
                line(
                    axes,
                    found,
                    runs,
                    color=hue,
                    drawstyle="steps-post" if number == "batch_samples" else "default",
                    label=label,
                )
            elif len(found):
                line(axes, found, runs, color=hue, alpha=0.35, linewidth=0.8)
                line(axes, found.smoothed(), runs, color=hue, label=label)
        if chart.log and _positive(runs, number):
            log_scale(axes)
        else:
            axes.set_ylim(bottom=0)
        finish(axes, "step", chart.unit, runs)

    return drawn(chart.name, chart.title, draw, png=png)


def memory_chart(runs: Runs, *, png: bool) -> Picture:
    """Draw the peaks of memory: of tensors, and what the allocator holds besides."""

    def draw(axes: Axes) -> None:
        for run, metrics, hue in coloured(runs):
            for number, kind, style in (("memory_gib", "tensors", "-"), ("memory_reserved_gib", "reserved", ":")):
                found = curve(metrics, number)
                if len(found):
                    label = kind if len(runs) == 1 else shown_name(run, runs) if style == "-" else None
                    line(axes, found, runs, color=hue, linestyle=style, label=label)
        axes.set_ylim(bottom=0)
        finish(axes, "step", "GiB of a GPU, peak so far", runs)

    return drawn("memory", "Memory", draw, png=png)


def save_chart(runs: Runs, *, png: bool) -> Picture:
    """Draw how long each save took, and how long training waited for it."""

    def draw(axes: Axes) -> None:
        for run, metrics, hue in coloured(runs):
            for number, kind, marker in SAVE_TIMES:
                found = curve(metrics, f"checkpoint/{number}")
                label = kind if len(runs) == 1 else shown_name(run, runs) if marker == "o" else None
                face = hue if marker == "o" else "white"
                axes.plot(found.x, found.y, marker, color=hue, markerfacecolor=face, markersize=4.5, label=label)
        axes.set_ylim(bottom=0)
        finish(axes, "step", "seconds", runs)

    return drawn("checkpoints", "Checkpoints: seconds of each save", draw, png=png)


def sweep_chart(values: Sequence[float], losses: Sequence[float], key: str, best: int | None, *, png: bool) -> Picture:
    """Draw the final loss of each run of a sweep by the value of a key."""

    def draw(axes: Axes) -> None:
        axes.plot(values, losses, "o", color=COLOURS[0])
        if best is not None:
            axes.plot([values[best]], [losses[best]], "*", color=COLOURS[1], markersize=13, label="winner")
        if min(values) > 0 and max(values) / min(values) > LOG_FROM:
            axes.set_xscale("log")
        axes.set(xlabel=key, ylabel="final loss")
        if best is not None:
            axes.legend()

    return drawn(f"sweep_{key}", f"Final loss by {key}", draw, png=png)


def _without_loss(metrics: Metrics) -> list[int]:
    return [row["step"] for row in metrics.steps if "loss" not in row]


def _mark_steps(
    axes: Axes, metrics: Metrics, axis: str, marks: Mapping[str, Sequence[int]], markers: Mapping[str, str]
) -> None:
    """Mark steps along the upper edge: those whose loss is not finite, and incidents; each kind by its marker."""
    for what, steps in marks.items():
        if not len(steps):
            continue
        x = positions(metrics, np.array(sorted(set(steps))), axis)
        style: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "clip_on": False, "zorder": 5, "markersize": 6}
        label = None if what in axes.get_legend_handles_labels()[1] else what  # an earlier run had it, too
        axes.plot(x, np.ones(len(x)), markers[what], color=ALARM, label=label, **style)
        for each in x[:40]:
            axes.axvline(each, color=ALARM, linewidth=0.6, alpha=0.35, zorder=0)


def _loss_scale(axes: Axes, runs: Runs) -> None:
    found = [
        values for metrics in runs.values() for name in ("loss", "eval_loss") for values in [metrics[name][1]] if len(values)
    ]
    lowest, highest = min(map(np.min, found)), max(map(np.max, found))
    if lowest > 0 and highest / lowest > LOG_FROM:
        log_scale(axes)


def _positive(runs: Runs, number: str) -> bool:
    values = [value for metrics in runs.values() for value in metrics[number][1]]
    return bool(values) and min(values) > 0
