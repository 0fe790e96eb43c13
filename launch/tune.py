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
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from ..config.problems import ConfigError, Problem
from ..models import swiglu
from .plan import WIDTH
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
        with console.status("asking the GPUs …"):
            memory, fused = gpu_here(arguments.memory)
        with console.status("planning …"):
            tuned = tune(arguments.overrides, memory, arguments.config_dir, fused=fused)
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


def gpu_here(given: float | None) -> tuple[float, bool]:
    """Bytes of --memory, or of the smallest GPU here, and whether GPUs here compute SwiGLU inside its products.

    Raises ConfigError where there is neither. Of given memory nobody knows whose it is, so that SwiGLU is taken to be plain.
    """
    if given is not None:
        if not (given > 0 and math.isfinite(given)):
            raise ConfigError([Problem("--memory", f"{given:g} is not a number of GiB", "give what one GPU has: --memory 80")])
        return given * GIB, False
    if torch.cuda.device_count() == 0:
        raise ConfigError([Problem("--memory", "there is no GPU here to ask", "give what one GPU has, in GiB: --memory 80")])
    # By a child: CUDA keeps some of a GPU's memory for every process that has spoken to it.
    with ProcessPoolExecutor(1, get_context("spawn")) as child:
        try:
            return child.submit(ask_gpus).result()
        except RuntimeError as error:
            fix = "look at nvidia-smi, or give what one GPU has, in GiB: --memory 80"
            raise ConfigError([Problem("--memory", f"the GPUs here do not answer: {error}", fix)]) from error


def ask_gpus() -> tuple[float, bool]:
    """Bytes of the smallest GPU of this machine, and whether its kernels compute SwiGLU inside the products around it."""
    memory = min(torch.cuda.get_device_properties(index).total_memory for index in range(torch.cuda.device_count()))
    return float(memory), swiglu.why_not(torch.device("cuda", 0)) is None


def table_of(tuned: Tuned) -> Table:
    """The fastest settings, best first, and the given ones."""
    title = "Fastest first, by prediction"
    table = Table(
        right("ZeRO"), right("micro-batches"), "activations", right("planned GiB"), right("speed"), "",
        title=title, title_justify="left", box=box.SIMPLE,
    )  # fmt: skip
    fastest = min(one.seconds for one in tuned.fitting)
    shown = tuned.fitting[:SHOWN]
    if tuned.as_given is not None and tuned.as_given not in shown:
        shown = [*shown, tuned.as_given]
    for one in shown:
        zero, micro, activation, budget = one.settings.values()
        remark = "as given" if one is tuned.as_given else ""
        remark += ", does not fit" if one.bytes > tuned.limit else ""
        kept = activation if budget is None else f"{budget:.0%} kept"
        speed = f"{fastest / one.seconds:.1%}"
        table.add_row(str(zero), f"{one.plan.job.micro_batches} × {micro}", kept, gib(one.bytes), speed, remark)
    return table
