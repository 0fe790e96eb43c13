"""Identity of a run: a resumed run keeps its id, a new one or a branch gets another."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint.files import LocalFiles, open_files
from ..checkpoint.folder import OWNER, list_steps, read_owner
from ..checkpoint.identity import UNNAMED, Parent, RunIdentity
from ..checkpoint.takeover import free_name
from .restarts import start_marks
from .watch.incidents import INCIDENTS

log = logging.getLogger(__name__)

METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class Origin:
    """The checkpoint that a run started from.

    run     the run that saved it; None: an import
    commit  number of the commit in its folder
    own     whether this run saved it and now resumes; otherwise this run branches off
    """

    run: RunIdentity | None
    step: int
    commit: int
    own: bool


def is_own(run: RunIdentity | None, folder: str) -> bool:
    """Return whether a checkpoint in `folder`, saved by `run`, is of the run that owns the folder."""
    files = open_files(folder)
    owner = read_owner(files)
    return run is not None and run.id == (list_steps(files).run if owner is None else owner.id)


def identify(origin: Origin | None, folder: str, *, resumes: bool) -> RunIdentity:
    """Return the identity of the run that starts.

    A resumed run keeps its identity, also if it was stopped before its first save. Any other run gets a new one.

    folder: its checkpoints; resumes: whether it was started to resume what is there
    """
    if origin is not None and origin.own and origin.run is not None:
        return origin.run
    parent = None if origin is None or origin.run is None else Parent(origin.run.id, origin.step)
    started = read_owner(open_files(folder)) if resumes else None
    return started if started is not None and started.parent == parent else RunIdentity.new(parent)


def take_over_metrics(output_dir: Path, run: RunIdentity) -> None:
    """Take over the files of rows in a folder, metrics and incidents: rename those of another run."""
    before = read_owner(LocalFiles(output_dir)) or UNNAMED
    if before.id != run.id:
        moved: list[str] = []
        for name in (METRICS, INCIDENTS):
            if (file := output_dir / name).exists():
                aside = free_name(output_dir, f"{file.stem}.replaced-{before.id[:8]}", file.suffix)
                file.replace(aside)
                moved.append(f"its {file.stem} are in {aside.name} now")
        if moved:
            log.warning("%s held another run, which this one replaces: %s", output_dir, ", and ".join(moved))
    (output_dir / OWNER).write_text(json.dumps({**run.as_dict(), **start_marks()}) + "\n")
