"""Which run this is: one that goes on, or a new one that may have branched off another, and what it finds in its folders."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint.files import LocalFiles, open_files
from ..checkpoint.folder import OWNER, list_steps, read_owner
from ..checkpoint.identity import UNNAMED, Parent, RunIdentity
from ..checkpoint.takeover import free_name

log = logging.getLogger(__name__)

METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class Origin:
    """The checkpoint that a run began from.

    run     the run that saved it; None: an import
    commit  its number in its folder
    own     whether it is of the run's own, which goes on; otherwise the run branches off
    """

    run: RunIdentity | None
    step: int
    commit: int
    own: bool


def is_own(run: RunIdentity | None, folder: str) -> bool:
    """Whether a checkpoint in a run's folder, saved by `run`, is one of the run that the folder belongs to."""
    files = open_files(folder)
    owner = read_owner(files)
    return run is not None and run.id == (list_steps(files).run if owner is None else owner.id)


def identify(origin: Origin | None, folder: str, *, resumes: bool) -> RunIdentity:
    """The identity of the run that begins. folder: of its checkpoints; resumes: it was started to go on with what is there.

    A run that goes on keeps its own, also where it was stopped before its first save. Any other gets a new one.
    """
    if origin is not None and origin.own and origin.run is not None:
        return origin.run
    parent = None if origin is None or origin.run is None else Parent(origin.run.id, origin.step)
    started = read_owner(open_files(folder)) if resumes else None
    return started if started is not None and started.parent == parent else RunIdentity.new(parent)


def take_over_metrics(output_dir: Path, run: RunIdentity) -> None:
    """Make the metrics in a run's folder this run's: those of another run get another name."""
    before = read_owner(LocalFiles(output_dir)) or UNNAMED
    metrics = output_dir / METRICS
    if metrics.exists() and before.id != run.id:
        aside = free_name(output_dir, f"metrics.replaced-{before.id[:8]}", ".jsonl")
        metrics.replace(aside)
        log.warning("%s held another run, which this one replaces: its metrics are in %s now", output_dir, aside.name)
    (output_dir / OWNER).write_text(json.dumps(run.as_dict()) + "\n")
