"""The tables of predicted time: a run's figures, the parts of its step. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator

from rich import box
from rich.table import Table
from rich.text import Text

from .checkpoint_needs import CheckpointNeeds, fewer_snapshots
from .prediction import Prediction, usable_bytes
from .tables import GIB, gib, right

EMPTY = 0.5
"""Part of a GPU's memory below which a plan is told to have room for more speed."""


def duration(days: float) -> str:
    """Format a time of days in the unit that suits it."""
    if days >= 1:
        return f"{days:,.1f} days"
    return f"{days * 24:.1f} hours" if days * 24 >= 1 else f"{days * 1440:.1f} minutes"


def seconds(value: float) -> str:
    """Format seconds with three digits."""
    if value >= 100:
        return f"{value:,.0f} s"
    return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms"


def prediction_table(found: Prediction) -> Table:
    """Tabulate what a run costs."""
    cluster = found.cluster
    how = "from data sheets; `meshloom calibrate` measures yours"
    if cluster.calibrated:
        unmeasured = "kernels measured, not all links; `meshloom calibrate` does under torchrun"
        how = "measured on these machines" if cluster.measured else unmeasured
        if found.band > cluster.band:
            how = "the host is the brake, of which calibration measures only a bare block"
    table = Table(show_header=False, title=f"Predicted on {found.gpus:,} × {cluster.gpu}", title_justify="left", box=box.SIMPLE)
    table.add_row("a step", f"{seconds(found.seconds)} ± {found.band:.0%} ({how})")
    table.add_row("speed", f"{found.tokens_per_second:,.0f} tokens/s a GPU, MFU {found.mfu:.1%}")
    table.add_row("the run", f"{found.tokens:,.3g} tokens: {duration(found.days)}, {found.gpu_hours:,.0f} GPU-hours")
    if found.cost is not None:
        table.add_row("cost", f"{found.cost:,.0f} at {cluster.price:g} a GPU-hour (cluster.price)")
    return table


def parts_table(found: Prediction) -> Table:
    """Tabulate the parts of a step, largest first, and what is hidden beside them."""
    table = Table("part", right("a step"), right("share"), title="Where a step goes", title_justify="left", box=box.SIMPLE)
    for name, value in sorted(found.time.parts.items(), key=lambda item: -item[1]):
        table.add_row(name, seconds(value), f"{value / found.seconds:.1%}")
    for name, value in found.time.beside.items():
        table.add_row(Text(f"{name}, hidden", style="dim"), Text(seconds(value), style="dim"), "")
    return table


def misfits(found: Prediction, needs: CheckpointNeeds) -> list[str]:
    """Say what of a run is too large for the cluster, and where most of a GPU is left empty."""
    cluster, away = found.cluster, found.step.away
    local = min(found.gpus, cluster.gpus_per_node)
    told: list[str] = []
    if found.bytes > (usable := usable_bytes(cluster.memory * GIB)):
        text = f"{gib(found.bytes)} GiB of a GPU are needed, and a plan may take {gib(usable)} of {cluster.memory:g}"
        told.append(f"does not fit: {text}; --best 1 finds what does")
    elif found.bytes < EMPTY * usable:
        told.append(
            f"{gib(usable - found.bytes)} of {cluster.memory:g} GiB stay empty; --best 3 finds what uses them for speed"
        )
    if local * (needs.host + away.host) > cluster.host_memory * GIB:
        text = f"{gib(local * (needs.host + away.host))} GiB of a node's memory are needed for snapshots and what is offloaded"
        told.append(f"checkpoint.host_memory_gib: {text}, and it has {cluster.host_memory:g}; {fewer_snapshots(needs)}")
    return told


def time_tables(found: Prediction, *, parts: bool) -> Iterator[Table]:
    """Make the tables of a prediction."""
    yield prediction_table(found)
    if parts:
        yield parts_table(found)
