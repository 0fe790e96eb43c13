"""`meshloom plan`: what a run would ask of its processes, by arithmetic. Starts no process and touches no GPU.

meshloom plan recipe=llama_8b launch.nproc=8 parallel.tp=2 parallel.pp=2 --draw-pipeline pipeline.svg
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..config.problems import ConfigError, Problem
from ..trainer.launching import planned_processes
from ..trainer.resolve import ResolvedRun, ResolveOptions, resolve
from .switches import BAD_CONFIG

WIDTH = 120  # columns, where no terminal says


def main(argv: Sequence[str]) -> int:
    """Print the plan of this command line's run. Returns 0, 2 for one that can't run, 1 if the drawing can't be written."""
    parser = argparse.ArgumentParser("meshloom plan", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("overrides", nargs="*", help="recipe=… and key=value, as for `meshloom train`")
    parser.add_argument("--draw-pipeline", metavar="FILE.svg", type=Path, help="draw the pipeline's schedule")
    parser.add_argument("--config-dir", help="folder of further recipes")
    arguments = parser.parse_intermixed_args(list(argv))
    try:
        options = ResolveOptions(lambda config: planned_processes(config.launch), resumes=False, data_elsewhere=True)
        resolved = resolve(arguments.overrides, options, arguments.config_dir)
        resolved.refuse()
        return show(resolved, arguments.draw_pipeline)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return BAD_CONFIG


def show(resolved: ResolvedRun, drawing: Path | None) -> int:
    """Print the plan of a run, and draw its pipeline. Returns 0, or 1 if the drawing can't be written. Raises ConfigError."""
    from rich.console import Console

    from ..planner.drawing import pipeline_svg
    from ..planner.host import available_memory
    from ..planner.tables import gib, plan_tables
    from .planning import plan_of, spared_by_fusing
    from .shortages import shortages

    plan = plan_of(resolved.config, resolved.notices)
    if drawing is not None and plan.cost.timeline is None:
        fix = "set parallel.pp to 2 or more, or leave --draw-pipeline out"
        raise ConfigError([Problem("--draw-pipeline", "there is no pipeline with parallel.pp=1", fix)])
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    for table in plan_tables(plan.parallel, plan.layout, plan.job, plan.cost, plan.samples):
        console.print(table)
    notes = list(plan.notes)
    if spared := spared_by_fusing(plan, resolved.config):
        where = "where SwiGLU is computed inside its products: Hopper GPUs, pip install 'meshloom[flash4]'"
        notes.append(f"{gib(spared)} GiB less {where}")
    for note in notes:
        console.print(f"· {note}", style="dim", highlight=False, markup=False)
    local = plan.layout.world_size // resolved.config.launch.nodes
    for problem in shortages(resolved.config, plan.needs, plan.away, local, available_memory()):
        console.print(f"! {problem}", style="yellow", highlight=False, markup=False)
    if drawing is not None:
        assert plan.cost.timeline is not None
        title = f"{plan.parallel.schedule} on {plan.parallel.pp} ranks, {plan.job.micro_batches} micro-batches"
        try:
            drawing.write_text(pipeline_svg(plan.cost.timeline, title), encoding="utf-8")
        except OSError as error:
            print(f"meshloom plan: {drawing}: {error.strerror}", file=sys.stderr)
            return 1
        console.print(f"drew {drawing}", highlight=False, markup=False)
    return 0
