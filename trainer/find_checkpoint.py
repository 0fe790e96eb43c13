"""Which checkpoint a run goes on from. Imports no torch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from ..checkpoint.errors import CheckpointError
from ..checkpoint.files import is_remote, open_files
from ..checkpoint.folder import find_latest
from ..checkpoint.manifest import MANIFEST
from ..config.problems import ConfigError, Problem

FROM = "auto:"


def resumes_own_run(resume: str) -> bool:
    """Return whether a run with this `resume` goes on with what it has saved itself, whenever there is something."""
    return resume == "auto" or resume.startswith(FROM)


def resumes_own(resume: str) -> bool:
    """Return whether this process goes on with what the run has saved: it was told so, or torchrun has restarted it."""
    return resumes_own_run(resume) or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def own_folder(config: DictConfig) -> str:
    """Return where a composed run's checkpoints are."""
    return str(config.checkpoint.folder or Path(config.output_dir) / "checkpoints")


def checkpoint_to_resume(config: DictConfig) -> Path | str | None:
    """Return the checkpoint that `resume` names.

    "none" is none; "auto" the run's own folder of them, or none yet; "auto:<path>" that folder too, but where the run has saved
    nothing yet, it begins from the path: what a job that is queued again and again says, when it fine-tunes or branches off.

    Processes that torchrun has restarted go on from what the run itself saved, whatever it began from.
    Raises ConfigError if a path was given that holds no complete checkpoint, or a folder can't be looked into.
    """
    wanted = str(config.resume)
    if resumes_own(wanted):
        folder = own_folder(config)  # not a step: `restore` passes over a damaged one, and asks the keepers' memory
        try:
            if _holds_checkpoint(folder):
                return folder
        except (OSError, CheckpointError) as error:
            fix = "give a checkpoint.folder, or an output_dir, that can be"
            raise ConfigError([Problem("checkpoint.folder", f"'{folder}' can't be read: {error}", fix)]) from error
    return None if wanted in ("auto", "none") else find_checkpoint(wanted.removeprefix(FROM), "resume")


def find_checkpoint(location: str, key: str) -> Path | str:
    """Return the checkpoint that a user named by a step's folder, a folder of steps or a run's folder (path or URL), as `key`.

    Raises ConfigError if none there is complete.
    """
    fix = "give a step-… folder, or the folder of a run that has saved one"
    if not location:
        raise ConfigError([Problem(key, "is empty", fix)])
    location = location if is_remote(location) else str(Path(location.removeprefix("file://")).expanduser())
    try:
        if open_files(location).size(MANIFEST) is not None:
            return location if is_remote(location) else Path(location)
        found = find_latest(location) or find_latest(f"{location.rstrip('/')}/checkpoints")
    except (OSError, ValueError, CheckpointError) as error:  # somebody else's folder, an unknown protocol, no name at all
        raise ConfigError([Problem(key, f"'{location}' can't be read: {error}", fix)]) from error
    if found is None:
        raise ConfigError([Problem(key, f"'{location}' holds no complete checkpoint", fix)])
    return found


def is_inside(checkpoint: Path | str, folder: str) -> bool:
    """Return whether a checkpoint is one of those in a run's folder, or that folder."""
    if is_remote(str(checkpoint)) or is_remote(folder):
        return f"{checkpoint}/".startswith(f"{folder.rstrip('/')}/")
    inner, outer = (Path(str(place).removeprefix("file://")).resolve() for place in (checkpoint, folder))
    return inner.is_relative_to(outer)


def is_import(state: dict[str, Any]) -> bool:
    """Return whether a checkpoint was not saved by a run (`meshloom checkpoint import`): it has no progress to go on from."""
    return "progress" not in state


def _holds_checkpoint(folder: str) -> bool:
    from ..checkpoint.restore import holds_checkpoint

    return holds_checkpoint(folder)


def checkpoint_state(checkpoint: Path | str) -> dict[str, Any]:
    """Return the JSON state of a checkpoint. Raises CheckpointError where it is damaged."""
    from ..checkpoint.restore import read_state

    return read_state(checkpoint)
