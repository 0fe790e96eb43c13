"""Drawings of a report that other parts of Meshloom make: a pipeline's timeline, and the load of experts."""

from __future__ import annotations

import contextlib

from ...checkpoint.errors import CheckpointError
from ...checkpoint.folder import read_newest
from ...config.problems import ConfigError
from ...trainer.launching import LaunchConfig
from ...trainer.typed import replace_keys
from .collect import ReportedRun
from .figure import Picture
from .winner import typed_run

EXPERTS = {"load": "Load of each expert over time", "sources": "Load of each expert, by source"}
MOST_BYTES = 2 << 20
"""A drawing of more bytes stays beside the run: the page has to open."""


def pipeline_drawing(run: ReportedRun) -> tuple[list[Picture], str]:
    """Draw the planned timeline of a step of a run with a pipeline. Returns it, and why it is not there if it should be."""
    parallel = run.config.get("parallel") or {}
    if not isinstance(parallel.get("pp"), int) or parallel["pp"] < 2:
        return [], ""
    from ...planner.drawing import pipeline_svg
    from ..planning import plan_of

    config = typed_run(run)
    if config is None:
        return [], f"the pipeline of {run.name}: today's Meshloom does not take its config"
    processes = _processes(run, config.launch)
    if not processes:
        why = "launch.nproc is auto, and no checkpoint tells on how many processes it ran"
        return [], f"the pipeline of {run.name}: {why}"
    try:
        plan = plan_of(replace_keys(config, {"launch.nproc": processes, "launch.nodes": 1}), ())
    except ConfigError as error:
        return [], f"the pipeline of {run.name}: {error.problems[0]}"
    assert plan.cost.timeline is not None
    title = f"{plan.parallel.schedule} on {plan.parallel.pp} ranks, {plan.job.micro_batches} micro-batches (planned)"
    name = f"pipeline_{run.name.replace('/', '_')}"
    return [Picture(name, f"{run.name}: {title}", pipeline_svg(plan.cost.timeline, title).encode())], ""


def _processes(run: ReportedRun, launch: LaunchConfig) -> int:
    """Return the number of processes of a run, as its newest checkpoint tells or its config; 0 if neither does."""
    folder = (run.config.get("checkpoint") or {}).get("folder") or run.run.folder / "checkpoints"
    with contextlib.suppress(CheckpointError, OSError, ValueError):
        if (manifest := read_newest(folder)) is not None:
            return manifest.world_size
    return launch.nproc * launch.most_nodes if isinstance(launch.nproc, int) else 0


def expert_drawings(run: ReportedRun) -> tuple[list[Picture], str]:
    """Return the heat maps that a run with a mixture has drawn. Returns them, and why one is left out."""
    found: list[Picture] = []
    left_out = ""
    for name, title in EXPERTS.items():
        path = run.run.folder / "experts" / f"{name}.svg"
        if not path.is_file():
            continue
        if path.stat().st_size > MOST_BYTES:
            left_out = f"the experts of {run.name}: {path} has {path.stat().st_size / 2**20:.0f} MiB; open it by itself"
            continue
        found.append(Picture(f"experts_{name}_{run.name.replace('/', '_')}", f"{run.name}: {title}", path.read_bytes()))
    return found, left_out
