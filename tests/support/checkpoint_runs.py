"""Small runs that save, for tests of what becomes of their checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from meshloom.checkpoint.checkpointer import Checkpointer
from meshloom.checkpoint.config import CheckpointConfig
from meshloom.checkpoint.control import Control
from meshloom.checkpoint.files import open_files
from meshloom.checkpoint.folder import open_step
from meshloom.checkpoint.manifest import StoredBox
from meshloom.checkpoint.reading.reader import Reader
from meshloom.checkpoint.restore import restore
from support.checkpoint_worlds import fragments, holds, make_arrays


def open_run(folder: Path, **config: object) -> Checkpointer:
    return Checkpointer(folder, Control.alone(), CheckpointConfig(**{"mode": "sync", "keep": 0, "timeout": 60.0, **config}))


def save_steps(folder: Path, *steps: int, **config: object) -> None:
    run = open_run(folder, **config)
    for step in steps:
        run.save(step, fragments(make_arrays(step), 1, 0)[0], {"step": step}, required=True)
        run.before_update()
    run.finish()


def restored_step(folder: Path) -> int:
    ranks = fragments(make_arrays(), 1, 0, blank=True)
    report = restore(folder, ranks[0], Control.alone())
    assert holds(ranks, make_arrays(report.step))
    return report.step


def stored_boxes(step: Path | str | None, key: str) -> Sequence[StoredBox]:
    """The boxes that an array of a finished step is stored in."""
    assert step is not None
    files = open_files(step)
    manifest = open_step(files)
    return Reader(files, manifest).boxes(manifest.arrays[key])
