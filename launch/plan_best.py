"""`meshloom plan --best N`: the fastest layouts of a run that fit a cluster, and why each is before the next."""

from __future__ import annotations

import importlib.util
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich import box
from rich.table import Column, Table

from ..config.problems import ConfigError, Problem
from ..data.assignment import Assigner
from ..optim.batch.config import FITTED
from ..parallel.config import ParallelConfig
from ..parallel.deepspeed.config import deepspeed_problems
from ..parallel.layout import Layout, layout_problems
from ..parallel.legality import is_legal
from ..parallel.limits import float8_layout_problems, masters_problems
from ..planner.cluster import GIB, ClusterConfig
from ..planner.cost import KINDS
from ..planner.search import (
    KEYS,
    MOST_GPUS,
    Candidate,
    Question,
    Settings,
    difference,
    limit_of,
    planned,
    search,
    smallest_cluster,
)
from ..planner.step_time import matrices_of
from ..planner.tables import gib, right
from ..planner.time_tables import duration, seconds
from ..trainer.costs import assigner_of, inventory_of, job_of, optimizer_of, run_tokens
from ..trainer.launching import planned_processes
from ..trainer.relations import layout_work
from ..trainer.resolve import ResolvedRun
from ..trainer.schema import RunConfig
from ..trainer.typed import replace_keys, value_of
from ..trainer.validate import checked_config
from .planning import needs_building, time_caveats, unplanned_problems
from .typed_words import changed_words, given_keys, micro_is_fixed

KEEPS = {"none": "keep all", "full": "recompute all"}
"""Activation policy → words for it in a table."""
MORE = 4
"""Candidates that are searched beyond those asked for: the trainer's own checks may refuse some."""


@dataclass(frozen=True)
class Best:
    """The best layouts of a run. given: key → value of the run as written; notes: what was not varied."""

    config: RunConfig
    given: dict[str, Any]
    candidates: list[Candidate]
    planned: int
    notes: list[str]

    def changes(self, candidate: Candidate) -> list[str]:
        """Return the overrides that turn the run as written into a candidate."""
        return changed_words(candidate.settings, self.given)


def best_layouts(
    resolved: ResolvedRun, overrides: Sequence[str], cluster: ClusterConfig, most: int, length: float | None = None
) -> Best:
    """Search the layouts of a checked run on a cluster.

    Keys that the run leaves to a plan are searched and told, whatever the plan of the run as written found for them.

    Raises ConfigError where nothing fits, with what is in the way, and where the trainer refuses all that fit, with the
    problems of the fastest.
    """
    config, fitted = resolved.config, resolved.fitted
    if problems := unplanned_problems(config):
        raise ConfigError(problems)
    cluster = replace(cluster, gpus=planned_processes(config.launch))
    given = {key: value_of(config, key) for key in KEYS}
    typed = given_keys(overrides) - set(fitted)
    fixed = {key: value for key, value in given.items() if key in typed}
    notes = [f"{', '.join(sorted(fixed))} as typed"] if fixed else []
    notes += time_caveats(config)
    if config.parallel.hdp != "none":
        notes.append("layouts are planned for whole samples; parallel.hdp deals documents: plan the one you take by itself")
    if "batch.micro" not in fixed and (why := micro_is_fixed(config)):
        fixed["batch.micro"] = given["batch.micro"]
        notes.append(f"batch.micro={given['batch.micro']} stays: {why}")
    question = _question(config, cluster, fixed, length)
    found = search(question, most + MORE)
    if not found.best:
        raise ConfigError([_in_the_way(question, found.least)])
    checked = [(one, _refusals(config, one)) for one in found.best]
    legal = [one for one, problems in checked if not problems][:most]
    if not legal:
        raise ConfigError(checked[0][1])
    notes += _float8_note(config, question, legal)
    return Best(config, {**given, **dict.fromkeys(fitted, FITTED)}, legal, found.planned, notes)


def _float8_note(config: RunConfig, question: Question, candidates: Sequence[Candidate]) -> list[str]:
    """Tell what float8 would give in the first layout that can have it, where the run does not."""
    if config.trainer.float8 != "none" or not question.cluster.fp8:
        return []
    for number, one in enumerate(candidates, 1):
        step = one.prediction.step
        if any(float8_layout_problems(step.parallel, config.precision)):
            continue
        changed = replace(question, job=replace(question.job, float8="tensorwise"))
        micro, policy = one.settings["batch.micro"], one.settings["trainer.activation"]
        found = planned(changed, step.parallel, step.layout, micro, step.job.micro_batches, policy).prediction
        faster = one.prediction.seconds / found.seconds - 1
        told = f"{found.tokens_per_second:,.0f} tokens/s a GPU in layout {number}, {faster:+.0%}"
        line = f"trainer.float8=tensorwise, which is recipe and so is never changed here, is predicted at {told}"
        return [line] if faster > 0 else []
    return []


def _question(config: RunConfig, cluster: ClusterConfig, fixed: dict[str, Any], length: float | None) -> Question:
    if config.optim.local.active:
        message = "layouts are not searched for islands, which are alike"
        fix = "search one for an island: optim.local.islands=1, on its share of the processes and of batch.samples"
        raise ConfigError([Problem("optim.local.islands", message, fix)])
    model = inventory_of(config)
    # What the recipe says of these may not suit the cluster; what is typed is fixed, and stays.
    alone: dict[str, Any] = {
        "tp": 1,
        "pp": 1,
        "cp": 1,
        "ep": 1,
        "replicate": 1,
        "zero": 1,
        "stage_layers": None,
        "stages_per_rank": None,
    }
    neutral = replace(config.parallel, **{key: value for key, value in alone.items() if f"parallel.{key}" not in fixed})
    one, single = Layout(), replace(config, parallel=replace(config.parallel, **alone, hdp="none", hdp_tokens=None))
    work = layout_work(config, model.shape)
    samples = config.batch.samples
    assert isinstance(samples, int)

    def passes(data: int, parallel: ParallelConfig, micro: int) -> int:
        same = assigner_of(replace(config, parallel=parallel), one)
        return Assigner(data, same.can_run, same.halves).passes(samples, micro)

    def legal(parallel: ParallelConfig, gpus: int) -> bool:
        if config.trainer.masters != "full" and any(masters_problems(parallel, config.precision, gpus)):
            return False
        if parallel.engine == "deepspeed":
            return not layout_problems(parallel, gpus) and not deepspeed_problems(parallel, config.precision, gpus)
        return is_legal(parallel, work, gpus)

    plain = replace(single, trainer=replace(config.trainer, activation="none", activation_budget=None))
    job = job_of(plain, model.shape, assigner_of(single, one), fused=None)
    engines = ["torch"]
    if importlib.util.find_spec("deepspeed") is not None and not model.shape.mixture_layers():
        engines.append("deepspeed")
    return Question(
        model=model,
        parallel=neutral,
        job=job,
        samples=samples,
        tokens=run_tokens(config),
        optimizer=optimizer_of(config),
        cluster=cluster,
        passes=passes,
        legal=legal,
        fixed=fixed,
        engines=engines,
        length=length,
        matrices=matrices_of(config.optim, model),
        saving=config.checkpoint,
    )


def _refusals(config: RunConfig, candidate: Candidate) -> list[Problem]:
    """List what the trainer's own checks have against a candidate."""
    changed = replace_keys(config, candidate.settings)
    if changed.trainer.activation_budget is not None and changed.trainer.activation != "none":
        changed = replace_keys(changed, {"trainer.activation_budget": None})
    _, problems = checked_config(changed, planned_processes(config.launch), elsewhere=[], builds=needs_building)
    return [problem for problem in problems if not problem.lacks]


def _in_the_way(question: Question, least: Candidate | None) -> Problem:
    """Explain why nothing fits: what the least layout needs, and the smallest cluster on which something does."""
    cluster = question.cluster
    if least is None:
        fix = "leave keys out that fix the layout, or use another number of GPUs"
        return Problem("cluster.gpus", f"no layout of this run divides {cluster.gpus} GPUs, or none could hold its state", fix)
    message = f"nothing fits {cluster.gpus} × {cluster.gpu}: the least, {' '.join(described(least))}, takes {_needs(least)}"
    if (enough := smallest_cluster(question)) is not None:
        return Problem(
            "cluster.gpus", message, f"cluster.gpus={enough.prediction.gpus} is enough: {' '.join(described(enough))}"
        )
    lacking = "GPUs" if not least.prediction.fits_gpus else "hosts"
    return Problem("cluster.gpus", message, f"use {lacking} with more memory: up to {MOST_GPUS:,} GPUs are not enough")


def _needs(least: Candidate) -> str:
    """Word what the candidate that needs least of a GPU takes, beside what there is: of the host, where the GPU has enough."""
    prediction, cluster = least.prediction, least.prediction.cluster
    rank = prediction.fullest
    if prediction.fits_gpus:
        held = f"{gib(prediction.host_bytes)} GiB of a node's host, which has {cluster.host_memory:g}"
        return f"{held}, for what it offloads, beside {gib(rank.total)} GiB a GPU"
    sizes = sorted(((size, kind) for kind, size in rank.at_peak.items()), reverse=True)[:3]
    told = ", ".join(f"{kind} {gib(size)}" for size, kind in sizes)
    return f"{gib(rank.total)} GiB a GPU ({told}), and a plan may take {gib(limit_of(cluster))} of {cluster.memory:g}"


def described(candidate: Candidate) -> list[str]:
    """Word the settings of a candidate briefly."""
    return described_settings(candidate.settings)


def described_settings(values: Settings) -> list[str]:
    """Word settings of all keys that are searched, those that say something."""
    found = list[str]()
    sizes = [("tp", "tp"), ("pp", "pp"), ("cp", "cp"), ("ep", "ep"), ("replicate", "replicate")]
    for key, name in sizes:
        if values.get(f"parallel.{key}", 1) > 1:
            found.append(f"{name} {values[f'parallel.{key}']}")
    if values["parallel.pp"] > 1:
        chunks = values["parallel.stages_per_rank"]
        found.append(values["parallel.schedule"] + (f" × {chunks}" if chunks else ""))
    found.append(f"ZeRO-{values['parallel.zero']}")
    if values["parallel.engine"] != "torch":
        found.append(values["parallel.engine"])
    if values["parallel.offload"] != "none":
        found.append(f"offload {values['parallel.offload']}")
    policy = str(values["trainer.activation"])
    found += [f"micro {values['batch.micro']}", KEEPS.get(policy, policy)]
    return found


def best_table(best: Best, cluster: ClusterConfig) -> Table:
    """Tabulate the candidates, fastest first."""
    band = max((each.prediction.band for each in best.candidates), default=cluster.band)
    table = Table(
        right(""), Column("layout", no_wrap=True), right("tokens/s a GPU"), right("MFU"), right("GiB"), right("a step"),
        right("the run"), right("GPU-hours"), *([right("cost")] if cluster.price is not None else []),
        title=f"Fastest of {best.planned:,} plans that were looked at, ± {band:.0%}",
        title_justify="left", box=box.SIMPLE,
    )  # fmt: skip
    for number, one in enumerate(best.candidates, 1):
        each = one.prediction
        cost = [f"{each.cost:,.0f}"] if each.cost is not None else []
        table.add_row(
            str(number), " · ".join(described(one)), f"{each.tokens_per_second:,.0f}", f"{each.mfu:.1%}", gib(each.bytes),
            seconds(each.seconds), duration(each.days), f"{each.gpu_hours:,.0f}", *cost,
        )  # fmt: skip
    return table


def memory_table(best: Best) -> Table:
    """Tabulate what fills the fullest GPU of each candidate."""
    table = Table(
        right(""), *map(right, KINDS), right("at most"), title="GiB of the fullest GPU", title_justify="left", box=box.SIMPLE
    )
    for number, one in enumerate(best.candidates, 1):
        rank = one.prediction.fullest
        table.add_row(str(number), *(gib(getattr(rank, kind) or 0) for kind in KINDS), gib(rank.total))
    return table


def reasons(best: Best) -> Iterator[str]:
    """Yield why each candidate is before the next: how much longer the next one's step is, and where."""
    for number, (one, other) in enumerate(zip(best.candidates, best.candidates[1:], strict=False), 1):
        behind = other.prediction.seconds / one.prediction.seconds - 1
        parts = ", ".join(difference(one, other)) or "nothing that shows"
        yield f"{number + 1} takes {behind:.1%} longer than {number}: {parts}"


def train_line(best: Best, candidate: Candidate, words: Sequence[str]) -> str:
    """Return the command line that trains in a candidate's layout."""
    changed = {change.partition("=")[0] for change in best.changes(candidate)}
    kept = [word for word in words if word.partition("=")[0] not in changed]
    return shlex.join(["meshloom", "train", *kept, *best.changes(candidate)])


def best_as_dict(best: Best, words: Sequence[str]) -> dict[str, Any]:
    """Return the result as plain values."""
    return {
        "planned": best.planned,
        "notes": best.notes,
        "best": [
            {
                "settings": dict(one.settings),
                "command": train_line(best, one, words),
                "usable_gib": limit_of(one.prediction.cluster) / GIB,
                **one.prediction.as_dict(),
            }
            for one in best.candidates
        ],
        "why": list(reasons(best)),
    }
