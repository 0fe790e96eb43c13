"""`meshloom plan`: what a run would ask of its processes, by arithmetic. Starts no process and touches no GPU.

meshloom plan recipe=llama_8b launch.nproc=8 parallel.tp=2 parallel.pp=2 --draw-pipeline pipeline.svg
meshloom plan recipe=llama_70b cluster=h100x512 --parts     seconds of a step, days, cost
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..config.problems import ConfigError, Problem
from ..planner.cluster import ClusterConfig, options
from ..trainer.resolve import ResolvedRun
from .exit_codes import BAD_CONFIG
from .plan_cluster import refuse_too_few, split_words
from .plan_documents import mean_length, read_documents, step_documents
from .planning import resolve_plan, without_searched

if TYPE_CHECKING:
    from rich.console import Console

    from ..planner.prediction import Prediction
    from ..trainer.schema import RunConfig
    from .planning import Plan

WIDTH = 120  # columns, where no terminal says
WIDE = 140  # of a table of layouts


def main(argv: Sequence[str]) -> int:
    """Print the plan of this command line's run. Returns 0, 2 for one that can't run, 1 if the drawing can't be written."""
    parser = argparse.ArgumentParser("meshloom plan", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("overrides", nargs="*", help="recipe=… and key=value, as for `meshloom train`")
    parser.add_argument("--draw-pipeline", metavar="FILE.svg", type=Path, help="draw the pipeline's schedule")
    parser.add_argument("--parts", action="store_true", help="with cluster=…: where the seconds of a step go")
    parser.add_argument("--best", metavar="N", type=int, default=0, help="with cluster=…: the N fastest layouts that fit")
    told = "with cluster=…: predict the run of this folder, and hold it against its metrics"
    parser.add_argument("--against", metavar="FOLDER", type=Path, help=told)
    parser.add_argument("--json", action="store_true", help="with cluster=…: print the prediction as JSON")
    told = "mean tokens of a document, where attention stays inside documents (default: a whole sample); data: the run's own"
    parser.add_argument("--documents", metavar="TOKENS", type=read_documents, help=told)
    parser.add_argument("--draw-step", metavar="FILE.svg", type=Path, help="draw the first step's documents on the data ranks")
    parser.add_argument("--config-dir", help="folder of further recipes")
    arguments = parser.parse_intermixed_args(list(argv))
    try:
        words, cluster = split_words(arguments.overrides, arguments.config_dir)
        _refuse_options(arguments)
        asked = arguments.parts or arguments.best or arguments.json or arguments.against
        if asked:
            _refuse_no_cluster(cluster, arguments)
        if cluster is not None and arguments.against is not None:
            return show_against(arguments.against, cluster, arguments)
        resolved = resolve_plan(words, arguments.config_dir, cluster)
        if arguments.best:
            resolved = without_searched(resolved, words)
        resolved.refuse()
        if arguments.documents is not None and resolved.config.parallel.hdp == "none":
            _refuse_no_cluster(cluster, arguments)  # documents are of times alone, where they are not dealt
        if cluster is not None:
            refuse_too_few(resolved.config, cluster)
        if cluster is not None and arguments.best:
            return show_best(resolved, words, cluster, arguments)
        return show(resolved, cluster, arguments)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return BAD_CONFIG


def _refuse_no_cluster(cluster: ClusterConfig | None, arguments: argparse.Namespace) -> None:
    """Raise ConfigError where what is asked for are times, and no cluster is chosen."""
    if cluster is None:
        fix = f"add cluster=…; there are: {', '.join(options(arguments.config_dir))}"
        raise ConfigError([Problem("cluster", "times are of a cluster, and none is chosen", fix)])


def _refuse_options(arguments: argparse.Namespace) -> None:
    """Raise ConfigError for values of options that can't be, and for options that say nothing together."""
    problems: list[Problem] = []
    if arguments.best < 0:
        problems.append(Problem("--best", f"{arguments.best} is not a number of layouts", "give 1 or more"))
    if arguments.documents == "data":
        if arguments.against is not None:
            text = "the data of a run's folder are not read again"
            problems.append(Problem("--documents", text, "give the mean tokens of a document"))
    elif arguments.documents is not None and not 0 < arguments.documents < math.inf:
        problems.append(Problem("--documents", f"{arguments.documents:g} is no length", "give a number of tokens above 0"))
    shown = "--best" if arguments.best else "--against" if arguments.against is not None else None
    for option in ("--draw-step", "--draw-pipeline") if shown is not None else ():
        if getattr(arguments, option.strip("-").replace("-", "_")) is not None:
            problems.append(
                Problem(option, f"nothing is drawn with {shown}", f"leave one of them out: {option} draws one plan")
            )
    if problems:
        raise ConfigError(problems)


def show_against(folder: Path, cluster: ClusterConfig, arguments: argparse.Namespace) -> int:
    """Print what was predicted of a run beside its metrics. Returns 0. Raises ConfigError for a folder without a run."""
    from dataclasses import asdict

    from rich.console import Console

    from ..planner.time_tables import parts_table
    from .plan_against import against, against_table, not_compared

    predicted, measured = against(folder, cluster, arguments.documents)
    if arguments.json:
        print(json.dumps({"predicted": predicted.as_dict(), "measured": asdict(measured)}, indent=2))
        return 0
    console = Console()
    console.print(against_table(predicted, measured))
    if line := not_compared(measured):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if arguments.parts:
        console.print(parts_table(predicted))
    return 0


def show_best(resolved: ResolvedRun, words: Sequence[str], cluster: ClusterConfig, arguments: argparse.Namespace) -> int:
    """Print the fastest layouts of a run. Returns 0. Raises ConfigError where nothing fits."""
    from rich.console import Console

    from ..planner.time_tables import parts_table
    from .plan_best import best_as_dict, best_layouts, best_table, memory_table, reasons, train_line

    length = arguments.documents
    if length == "data":
        length = mean_length(step_documents(resolved.config, length))
    best = best_layouts(resolved, words, cluster, arguments.best, length)
    words = [*([f"--config-dir={arguments.config_dir}"] if arguments.config_dir else []), *words]
    if arguments.json:
        print(json.dumps(best_as_dict(best, words), indent=2))
        return 0
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDE)
    console.print()
    tables = [best_table(best, cluster), memory_table(best)]
    for table in [*tables, *([parts_table(best.candidates[0].prediction)] if arguments.parts else [])]:
        console.print(table)
    for line in [*reasons(best), *best.notes]:
        console.print(f"· {line}", highlight=False, markup=False)
    console.print()
    for candidate in best.candidates:  # not through rich, which would wrap a line that is there to be copied
        print(train_line(best, candidate, words))
    return 0


def stage_lines(resolved: ResolvedRun) -> Iterator[str]:
    """Yield the table of a run's stages, and what the rank that needs most holds in each; nothing of a run without any."""
    from ..planner.tables import gib
    from ..trainer.stages.written import stage_table
    from .planning import plan_of

    if resolved.place is None:
        return
    yield from stage_table(resolved.place.stages, resolved.place.number)
    for run in (resolved, *resolved.then):
        assert run.place is not None
        plan = plan_of(run.config, ())
        yield f"  {run.place.stage.name}: {plan.samples} samples of {run.config.data.seq_len:,}, {gib(plan.bytes)} GiB at most"
    yield "the tables below are of the first stage"


@dataclass(frozen=True)
class _Shown:
    """A plan as it is shown.

    found      its prediction; None without a cluster
    notes      remarks on the figures
    problems   what is too small for the run: of the cluster, or of this machine without one
    """

    plan: Plan
    found: Prediction | None
    notes: list[str]
    problems: list[str]


def show(resolved: ResolvedRun, cluster: ClusterConfig | None, arguments: argparse.Namespace) -> int:
    """Print the plan of a run, and draw its pipeline and its first step. Returns 0, or 1 if a drawing can't be written.

    Raises ConfigError.
    """
    from rich.console import Console

    shown = _collect(resolved, cluster, arguments)
    drawings = _draw(resolved.config, shown.plan, arguments)
    if shown.found is not None and arguments.json:
        print(json.dumps({**shown.found.as_dict(), "problems": shown.problems}, indent=2))
        return _write(drawings, Console(stderr=True))
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    _print(resolved, shown, console, parts=arguments.parts)
    return _write(drawings, console)


def _collect(resolved: ResolvedRun, cluster: ClusterConfig | None, arguments: argparse.Namespace) -> _Shown:
    """Plan and predict a run, and collect what is to be said of it."""
    from ..data.documents.lengths import describe_lengths
    from ..planner.host import available_memory
    from ..planner.time_tables import misfits
    from .plan_cluster import predict
    from .planning import exchange_notes, plan_of, time_caveats
    from .shortages import shortages

    config, documents, length = resolved.config, None, arguments.documents
    if arguments.documents is not None:
        documents = step_documents(config, arguments.documents)
    own: list[str] = []
    if documents and arguments.documents == "data":
        length = mean_length(documents)
        own.append(f"own documents of the first step: {describe_lengths(documents)}")
    plan = plan_of(config, resolved.notices, documents=documents, per_host=None if cluster is None else cluster.gpus_per_node)
    notes = [*own, *plan.notes, *exchange_notes(plan, config)]
    if cluster is None:
        local = plan.processes // config.launch.most_nodes
        problems = [*map(str, shortages(config, plan.needs, plan.away, local, available_memory()))]
        return _Shown(plan, None, [*notes, *_spared_notes(plan, config)], problems)
    found = predict(plan, config, cluster, length)
    notes += [*time_caveats(config), *_spared_notes(plan, config)]
    return _Shown(plan, found, notes, misfits(found, plan.needs))  # what is free on this machine says nothing about the cluster


def _spared_notes(plan: Plan, config: RunConfig) -> Iterator[str]:
    from ..planner.tables import gib
    from .planning import spared_by_fusing

    if spared := spared_by_fusing(plan, config):
        where = "where SwiGLU is computed inside its products: Hopper GPUs, pip install 'meshloom[flash4]'"
        yield f"{gib(spared)} GiB less {where}"


def _print(resolved: ResolvedRun, shown: _Shown, console: Console, *, parts: bool) -> None:
    """Print the tables of a plan, its notes and its problems."""
    from ..planner.tables import plan_tables
    from ..planner.time_tables import time_tables
    from .plan_cluster import assumed_cluster

    plan, found = shown.plan, shown.found
    for line in [*([] if found is not None else [assumed_cluster(resolved)]), *stage_lines(resolved)]:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    for table in plan_tables(plan.model.shape, plan.parallel, plan.layout, plan.job, plan.cost, plan.samples):
        console.print(table)
    for table in time_tables(found, parts=parts) if found is not None else ():
        console.print(table)
    for note in shown.notes:
        console.print(f"· {note}", style="dim", highlight=False, markup=False)
    for problem in shown.problems:
        console.print(f"! {problem}", style="yellow", highlight=False, markup=False)


def _draw(config: RunConfig, plan: Plan, arguments: argparse.Namespace) -> list[tuple[Path, str]]:
    """Return the drawings that are asked for: file and SVG. Raises ConfigError where there is nothing to draw."""
    from ..planner.drawing import pipeline_svg

    drawings: list[tuple[Path, str]] = []
    if arguments.draw_pipeline is not None:
        if plan.cost.timeline is None:
            fix = "set parallel.pp to 2 or more, or leave --draw-pipeline out"
            raise ConfigError([Problem("--draw-pipeline", "there is no pipeline with parallel.pp=1", fix)])
        title = f"{plan.parallel.schedule} on {plan.parallel.pp} ranks, {plan.job.micro_batches} micro-batches"
        drawings.append((arguments.draw_pipeline, pipeline_svg(plan.cost.timeline, title)))
    if arguments.draw_step is not None:
        if plan.parallel.hdp == "none":
            fix = "set parallel.hdp=greedy, or leave --draw-step out"
            raise ConfigError([Problem("--draw-step", "with parallel.hdp=none whole samples are dealt, not documents", fix)])
        from .step_picture import step_picture

        drawings.append((arguments.draw_step, step_picture(config, plan)))
    return drawings


def _write(drawings: Sequence[tuple[Path, str]], console: Console) -> int:
    """Write drawings and tell of each. Returns 0, or 1 if one can't be written."""
    for path, picture in drawings:
        try:
            path.write_text(picture, encoding="utf-8")
        except OSError as error:
            print(f"meshloom plan: {path}: {error.strerror}", file=sys.stderr)
            return 1
        console.print(f"drew {path}", highlight=False, markup=False)
    return 0
