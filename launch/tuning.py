"""Tune a command line that can be tuned: search, measure, show."""

from __future__ import annotations

import math
import shlex
import signal
import sys
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from ..config.problems import ConfigError, Problem
from ..planner.cluster import ClusterConfig
from ..planner.gpus import GpusHere
from ..planner.host import available_memory
from ..planner.tables import GIB, gib, right
from .plan import WIDTH
from .tune_cluster import layouts_table, tuned_on
from .tune_measure import check, measure, refuse_on_cpu
from .tune_search import Tuned, tune

SHOWN = 10
"""Candidates in the table."""


def tune_and_show(
    overrides: Sequence[str],
    config_dir: str | None,
    memory_gib: float | None,
    trials: int,
    cluster: ClusterConfig | None = None,
) -> int:
    """Print the fastest settings, and measure that many of the best. Return the exit code. Raises ConfigError.

    cluster: whose layouts are searched, too; None: only what a layout leaves to choose
    """
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    command = [*([f"--config-dir={config_dir}"] if config_dir else []), *overrides]
    with console.status("planning …"):
        if cluster is None:
            tuned, memory = _tuned(overrides, config_dir, memory_gib)
        else:
            tuned, memory = tuned_on(overrides, cluster, config_dir), cluster.memory * GIB
    if trials:
        check(tuned.config)
        refuse_on_cpu(tuned, tuned.fitting[:trials])
    console.print()
    usable = f"{tuned.limit / GIB:.1f} of {memory / GIB:.1f} GiB"
    layout = tuned.fitting[0].plan.layout
    told = layout.describe().partition(", ZeRO")[0] if cluster is None else f"{layout.world_size} processes"
    console.print(f"{told}; a plan may take {usable}", highlight=False)
    console.print(table_of(tuned) if cluster is None else layouts_table(tuned))
    for note in tuned.notes:
        console.print(f"· {note}", style="dim", highlight=False, markup=False)
    best = tuned.fitting[0]
    if trials:
        try:
            measured = measure(tuned, tuned.fitting[:trials], overrides, config_dir, console)
        except KeyboardInterrupt:
            print("meshloom tune: stopped, with what it had started", file=sys.stderr)
            return 128 + signal.SIGINT
        if measured is None:
            print("meshloom tune: none of them could be measured", file=sys.stderr)
            return 1
        best = measured
    # Not through rich, which would wrap a line that is there to be copied.
    print(shlex.join(["meshloom", "train", *command, *tuned.changes(best)]))
    return 0


def _tuned(overrides: Sequence[str], config_dir: str | None, memory: float | None) -> tuple[Tuned, float]:
    """Search for GPUs of `memory` GiB, or for those here; return the result and a GPU's bytes. Raises ConfigError."""
    if memory is not None:
        if not (memory > 0 and math.isfinite(memory)):
            raise ConfigError([Problem("--memory", f"{memory:g} is not a number of GiB", "give what one GPU has: --memory 80")])
        return tune(overrides, memory * GIB, config_dir), memory * GIB
    with GpusHere() as gpus:
        size = gpus.memory()
        free = available_memory()
        return tune(overrides, size, config_dir, host=free, fused_swiglu_blocker=gpus.fused_swiglu_blocker), size


def table_of(tuned: Tuned) -> Table:
    """Tabulate the fastest settings, best first, and the given ones. Sizes are per process."""
    title = "Fastest first, by prediction"
    shown = tuned.fitting[:SHOWN]
    if tuned.as_given is not None and tuned.as_given not in shown:
        shown = [*shown, tuned.as_given]
    # Only where something is offloaded.
    places = [place for place in ("host", "disk") if any(getattr(one.plan.away, place) for one in shown)]
    table = Table(
        right("ZeRO"), right("micro-batches"), "activations", right("planned GiB"),
        *(right(f"{place} GiB") for place in places), right("speed"), "",
        title=title, title_justify="left", box=box.SIMPLE,
    )  # fmt: skip
    fastest = min(one.seconds for one in tuned.fitting)
    for one in shown:
        zero, micro, activation, budget = one.settings.values()
        size = one.plan.job.row or micro
        remark = "as given" if one is tuned.as_given else ""
        remark += "" if tuned.fits(one) else ", does not fit"
        kept = activation if budget is None else f"{budget:.0%} kept"
        sizes = [gib(one.bytes), *(gib(getattr(one, place)) for place in places)]
        table.add_row(
            str(zero),
            f"{one.plan.job.micro_batches} × {size}",
            kept,
            *sizes,
            f"{fastest / one.seconds:.1%}",
            remark,
        )
    return table
