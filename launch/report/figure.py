"""A figure of a report: its look, its axes and lines, and its files."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from ..run_metrics import Metrics
from .curves import AXES, Curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#2563eb", "#ea580c", "#16a34a", "#9333ea", "#dc2626", "#0891b2", "#ca8a04", "#db2777", "#4b5563", "#65a30d")
INK, GREY, ALARM = "#334155", "#94a3b8", "#dc2626"
SIZE = (6.0, 3.1)
WIDE = (11.5, 4.2)
POINTS = 800
"""Points of a line; of several runs, all lines of a chart share twice as many."""
INSIDE = 4
"""Most runs whose names fit into a panel. Beyond, colours are told beside the charts of the loss."""
NAMED = 12
"""Most runs that a legend names."""

STYLE: dict[Any, Any] = {
    **{"font.family": "sans-serif", "font.sans-serif": ["Inter", "Helvetica", "Arial", "DejaVu Sans"], "font.size": 9},
    **{"svg.fonttype": "none", "svg.hashsalt": "meshloom", "axes.edgecolor": GREY, "axes.labelcolor": INK},
    **{"xtick.color": INK, "ytick.color": INK, "axes.grid": True, "grid.color": "#e2e8f0", "grid.linewidth": 0.7},
    **{"axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "legend.frameon": False},
    **{"legend.fontsize": 8, "axes.titlesize": 10, "lines.linewidth": 1.4, "figure.facecolor": "white"},
}


@dataclass(frozen=True)
class Picture:
    """A chart as files. name: of the files; title: what it shows; png: None where it was not drawn by matplotlib."""

    name: str
    title: str
    svg: bytes
    png: bytes | None = None


Runs = Mapping[str, Metrics]
"""Name → metrics of the runs that a chart compares."""


def drawn(name: str, title: str, draw: Callable[[Axes], object], size: tuple[float, float] = SIZE, *, png: bool) -> Picture:
    """Draw a figure of one panel, and return it as files."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.add_subplot())
        svg = _file(figure, "svg")
        figure.set_layout_engine("none")  # everything is in its place now, and finding it again takes half the time
        return Picture(name, title, svg, _file(figure, "png") if png else None)


def _file(figure: Figure, kind: str) -> bytes:
    written = io.BytesIO()
    figure.savefig(written, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
    return written.getvalue()


def coloured(runs: Runs) -> Iterator[tuple[str, Metrics, Any]]:
    """Yield name, metrics and colour of each run."""
    for at, (name, metrics) in enumerate(runs.items()):
        yield name, metrics, colour(at, len(runs))


def colour(at: int, count: int) -> Any:
    """Return the colour of a line, of so many."""
    if count <= len(COLOURS):
        return COLOURS[at]
    import matplotlib

    return matplotlib.colormaps["viridis"](at / (count - 1))


def shown_name(name: str, runs: Runs) -> str | None:
    """Return the name of a run in a legend; None where it has none: of one run, and of those after the first few."""
    return name if len(runs) > 1 and list(runs).index(name) < NAMED else None


def line(axes: Axes, found: Curve, runs: Runs, **style: Any) -> None:
    """Draw a curve, thinned so that a chart of many runs stays small; of a single point, a dot; of none, nothing."""
    if not len(found):
        return
    thinned = found.thinned(min(POINTS, max(100, 2 * POINTS // max(1, len(runs)))))
    alone: dict[str, Any] = {"marker": "o", "markersize": 3} if len(thinned) == 1 else {}
    axes.plot(thinned.x, thinned.y, **{**style, **alone})


def finish(axes: Axes, axis: str, ylabel: str, runs: Runs, *, legend: bool = False) -> None:
    """Label the axes, and add a legend where there is something to tell apart.

    axis: a key of `AXES`; legend: also for many runs, beside the panel
    """
    from matplotlib.ticker import FuncFormatter

    if axis == "seconds":
        unit, name = _time_unit(axes.get_xlim()[1])
        axes.xaxis.set_major_formatter(FuncFormatter(partial(_tick_in, unit)))
        axes.xaxis.set_major_locator(_unit_locator(unit))
        axes.set_xlabel(f"{name} in steps")
    else:
        axes.xaxis.set_major_formatter(FuncFormatter(_tick))
        axes.set_xlabel(AXES[axis])
    axes.set_ylabel(ylabel)
    if axes.get_yscale() == "linear":
        axes.yaxis.set_major_formatter(FuncFormatter(_tick))
    crowded = len(runs) > INSIDE
    if not axes.get_legend_handles_labels()[0] or (crowded and not legend):
        return
    if len(runs) > NAMED:
        axes.plot([], [], " ", label=f"and {len(runs) - NAMED} more runs")
    place: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0)} if crowded else {}
    axes.legend(**place)


def log_scale(axes: Axes) -> None:
    """Make the y axis logarithmic, with ticks that are plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axes.dataLim.intervaly
    decades = math.log10(high / low) if 0 < low < high else 1.0
    marks = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0) if decades < 1 else (1.0, 2.0, 5.0) if decades < 3 else (1.0,)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=marks))
    axes.yaxis.set_major_formatter(FuncFormatter(_tick))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _time_unit(longest: float) -> tuple[float, str]:
    units = ((1.0, "seconds"), (60.0, "minutes"), (3600.0, "hours"), (86400.0, "days"))
    return next(((size, name) for size, name in reversed(units) if longest >= 2 * size), units[0])


def _unit_locator(unit: float) -> Any:
    """Return a locator whose ticks are round numbers of a unit."""
    from matplotlib.ticker import MaxNLocator

    class InUnits(MaxNLocator):
        def tick_values(self, vmin: float, vmax: float) -> Any:
            return [unit * each for each in super().tick_values(vmin / unit, vmax / unit)]

    return InUnits(nbins=8, steps=[1, 2, 2.5, 5, 10])


def _tick(value: float, _position: int | None = None) -> str:
    return short(value)


def _tick_in(unit: float, value: float, _position: int | None = None) -> str:
    return f"{value / unit:g}"


def short(value: float) -> str:
    """Write a number shortly: 1.5M, 2B, 250k, 0.003."""
    for size, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if name == 'k' else size):.4g}{name}"
    return f"{value:.4g}" if math.isfinite(value) else ""
