"""Plot of `meshloom fit`: a panel for each law that was fitted or swept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from .fit_runs import Fits, Sweep


def draw(fits: Fits, folder: Path) -> list[Path]:
    """Write fit.png and fit.svg. Return their paths; none if there is nothing to draw."""
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("drawing needs matplotlib: pip install 'meshloom[plots]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels: list[Callable[[Any], None]] = []
    if fits.lr_sweeps:
        panels.append(lambda axes: _sweeps(axes, fits.lr_sweeps, "learning rate"))
    if fits.lr:
        panels.append(lambda axes: _optima(axes, fits.lr_sweeps, fits.lr, "learning rate"))
    if fits.batch_sweeps:
        panels.append(lambda axes: _sweeps(axes, fits.batch_sweeps, "batch (tokens)"))
    if fits.batch:
        panels.append(lambda axes: _optima(axes, fits.batch_sweeps, fits.batch, "batch (tokens)"))
    if fits.loss:
        panels.append(lambda axes: _loss(axes, fits))
    if fits.critical:
        panels.append(lambda axes: _curves(axes, fits))
        panels.append(lambda axes: _critical(axes, fits))
    if not panels:
        return []
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, grid = pyplot.subplots(rows, columns, figsize=(5 * columns, 4 * rows), squeeze=False, layout="constrained")
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for panel, axes in zip(panels, grid.flat, strict=False):
        panel(axes)
    paths = [folder / "fit.png", folder / "fit.svg"]
    for path in paths:
        figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return paths


def _label(at: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.2g}" for name, value in at.items())


def _sweeps(axes: Any, sweeps: list[Sweep], name: str) -> None:
    for sweep in sweeps:
        line = axes.plot(sweep.values, sweep.losses, "o-", markersize=4, label=_label(sweep.at))[0]
        if sweep.best.inside:
            axes.plot([sweep.best.value], [sweep.best.loss], "*", markersize=12, color=line.get_color())
    axes.set(xscale="log", xlabel=name, ylabel="loss", title=f"sweeps of the {name}, ★ optimum")
    axes.legend(fontsize=7)


def _optima(axes: Any, sweeps: list[Sweep], law: Any, name: str) -> None:
    inside = [sweep for sweep in sweeps if sweep.best.inside]
    predicted = [law(**{key: sweep.at[key] for key in law.exponents}) for sweep in inside]
    found = [sweep.best.value for sweep in inside]
    ends = [min(predicted + found) / 1.3, max(predicted + found) * 1.3]
    axes.plot(ends, ends, "--", color="grey")
    axes.plot(predicted, found, "o")
    axes.set(xscale="log", yscale="log", xlabel=str(law), ylabel=f"best {name}", title=f"{name}: law and optima")


def _loss(axes: Any, fits: Fits) -> None:
    assert fits.loss is not None
    for parameters in sorted({cell.parameters for cell in fits.cells}):
        cells = sorted((cell for cell in fits.cells if cell.parameters == parameters), key=lambda cell: cell.tokens)
        tokens = np.geomspace(cells[0].tokens / 1.5, cells[-1].tokens * 1.5, 50)
        line = axes.plot(tokens, [fits.loss(parameters, each) for each in tokens], "-", label=f"N {parameters:.3g}")[0]
        axes.plot([cell.tokens for cell in cells], [cell.loss for cell in cells], "o", color=line.get_color())
    axes.set(xscale="log", xlabel="tokens", ylabel="loss", title=f"L(N, D) = {fits.loss}")
    axes.title.set_fontsize(9)
    axes.legend(fontsize=7)


def _curves(axes: Any, fits: Fits) -> None:
    for batch, (steps, losses) in (fits.curves or {}).items():
        axes.plot(steps, losses, label=f"{batch:.3g} tokens")
    axes.set(xscale="log", xlabel="steps", ylabel="loss", title="loss curves by batch")
    axes.legend(fontsize=7)


def _critical(axes: Any, fits: Fits) -> None:
    assert fits.critical is not None
    law, at = fits.critical
    levels = np.array(sorted(at))
    axes.plot(levels, [at[level].batch for level in levels], "o")
    axes.plot(levels, [law(L=level) for level in levels], "-", label=f"B_crit = {law}")
    axes.set(xscale="log", yscale="log", xlabel="loss", ylabel="critical batch (tokens)", title="critical batch")
    axes.legend(fontsize=8)
