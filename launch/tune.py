"""`meshloom tune`: the fastest settings that fit, for a recipe and a machine. By arithmetic; --measure N tries the N best.

meshloom tune recipe=llama_8b launch.nproc=2 --measure 3

It varies what changes speed and memory alone: parallel.zero, batch.micro, trainer.activation and, where blocks can't keep
everything, trainer.activation_budget. What the command line gives stays as it is, and so does all else.
"""

from __future__ import annotations

import argparse
import math
import shlex
import signal
import sys
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from ..config.problems import ConfigError, Problem
from ..trainer.schema import make_composer
from .gpus_here import GpusHere
from .host import available_memory
from .plan import WIDTH, plan_of
from .plan_tables import GIB, gib, right
from .train import BAD_CONFIG
from .tune_measure import check, measure
from .tune_search import Tuned, tune

SHOWN = 10
"""Candidates in the table."""


def main(argv: Sequence[str]) -> int:
    """Print what is fastest. Returns 0; 2 for a run that can't be, whatever its settings; 1 if none could be measured."""
    parser = argparse.ArgumentParser("meshloom tune", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("overrides", nargs="*", help="recipe=… and key=value, as for `meshloom train`")
    told = "memory of a GPU in GiB (default: of the smallest one here)"
    parser.add_argument("--memory", metavar="GIB", type=float, help=told)
    told = "run the N best for a few steps each, and rank them by what they did"
    parser.add_argument("--measure", metavar="N", type=int, default=0, help=told)
    parser.add_argument("--config-dir", help="folder of further recipes")
    arguments = parser.parse_intermixed_args(list(argv))
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    command = [*([f"--config-dir={arguments.config_dir}"] if arguments.config_dir else []), *arguments.overrides]
    try:
        if arguments.measure < 0:
            raise ConfigError([Problem("--measure", f"{arguments.measure} is not a number of runs", "give 1 or more")])
        with console.status("planning …"):
            tuned, memory = _tuned(arguments.overrides, arguments.config_dir, arguments.memory)
        if arguments.measure:
            check(tuned.config)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return BAD_CONFIG
    console.print()
    usable = f"{tuned.limit / GIB:.1f} of {memory / GIB:.1f} GiB"
    console.print(f"{tuned.fitting[0].plan.layout.describe().rpartition(',')[0]}; a plan may take {usable}", highlight=False)
    console.print(table_of(tuned))
    for note in tuned.notes:
        console.print(f"· {note}", style="dim", highlight=False, markup=False)
    best = tuned.fitting[0]
    if arguments.measure:
        try:
            measured = measure(tuned, tuned.fitting[: arguments.measure], arguments.overrides, arguments.config_dir, console)
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
    """What `tune` finds for GPUs of `memory` GiB, or for those here, and the bytes of one. Raises ConfigError."""
    composition = make_composer(config_dir).compose(overrides)
    if composition.problems:  # before anything slow
        plan_of(composition.config, composition.problems)
    if memory is not None:
        if not (memory > 0 and math.isfinite(memory)):
            raise ConfigError([Problem("--memory", f"{memory:g} is not a number of GiB", "give what one GPU has: --memory 80")])
        return tune(overrides, memory * GIB, config_dir), memory * GIB
    with GpusHere() as gpus:
        size = gpus.memory()
        free = available_memory()
        return tune(overrides, size, config_dir, host=free, fused_swiglu_blocker=gpus.fused_swiglu_blocker), size


def table_of(tuned: Tuned) -> Table:
    """The fastest settings, best first, and the given ones. Sizes are a process's."""
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
        remark = "as given" if one is tuned.as_given else ""
        remark += "" if tuned.fits(one) else ", does not fit"
        kept = activation if budget is None else f"{budget:.0%} kept"
        sizes = [gib(one.bytes), *(gib(getattr(one, place)) for place in places)]
        table.add_row(
            str(zero), f"{one.plan.job.micro_batches} × {micro}", kept, *sizes, f"{fastest / one.seconds:.1%}", remark
        )
    return table
