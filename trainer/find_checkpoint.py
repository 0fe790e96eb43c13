"""Find the checkpoint that a run resumes from. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig

from ..checkpoint.errors import CheckpointError, UnreadableError
from ..checkpoint.files import HUGGING_FACE, hugging_face_folder, is_remote, local_path, open_files
from ..checkpoint.folder import KEEPERS, find_latest, read_newest, step_name, steps_newest_first
from ..checkpoint.manifest import MANIFEST, Manifest
from ..config.problems import ConfigError, Problem
from ..optim.progress import Progress
from .derived import checkpoint_folder
from .restarts import is_restarted

AUTO_FROM = "auto:"
"""Prefix of `resume=auto:<path>`."""


def resume_names_own_run(resume: str) -> bool:
    """Return whether a run with this value of `resume` resumes from its own checkpoints once it has saved some."""
    return resume == "auto" or resume.startswith(AUTO_FROM)


def continues_own_run(resume: str, output_dir: str | Path) -> bool:
    """Return whether this process resumes from the run's own checkpoints: by `resume`, or because it was started again."""
    return resume_names_own_run(resume) or is_restarted(Path(output_dir))


def checkpoint_to_resume(config: DictConfig) -> Path | str | None:
    """Return the checkpoint that `resume` names.

    none         no checkpoint
    auto         the run's own checkpoint folder; no checkpoint while it is empty
    auto:<path>  the run's own folder; the path while that is empty. For jobs that are requeued and fine-tune or branch off
    <path>       that checkpoint
    hf:<folder>  a Hugging Face folder, read as a checkpoint; also as auto:hf:<folder>

    Processes of a run that torchrun or SLURM has started again resume from its own checkpoints, whatever `resume` says.
    Raises ConfigError if the path holds no complete checkpoint, the folder can't be read, or it is empty while the run has
    checkpoints in another folder.
    """
    wanted = str(config.resume)
    if continues_own_run(wanted, config.output_dir):
        folder = checkpoint_folder(config)  # not a step: `restore` skips damaged ones and also looks into memory
        try:
            if _holds_checkpoint(folder):
                return folder
        except (OSError, CheckpointError) as error:
            fix = "start again once it can be, or give a checkpoint.folder, or an output_dir, that can"
            raise ConfigError([Problem("checkpoint.folder", f"'{folder}' can't be read: {error}", fix)]) from error
        _refuse_forgotten_folder(config, folder)
    return None if wanted in ("auto", "none") else find_checkpoint(wanted.removeprefix(AUTO_FROM), "resume")


def _refuse_forgotten_folder(config: DictConfig, folder: str) -> None:
    """Raise ConfigError where the run of output_dir has saved into another folder of checkpoints than today's empty one."""
    described = _described_folder(Path(config.output_dir))
    if described is None or described == folder:
        return
    try:
        if not _holds_checkpoint(described):
            return
        holds = "has its checkpoints in"
    except (OSError, CheckpointError):
        holds = "saves into a place that can't be read now,"
    message = f"'{folder}' holds no checkpoint, and the run in '{config.output_dir}' {holds} '{described}'"
    fix = f"type checkpoint.folder={described}, or begin anew with resume=none"
    raise ConfigError([Problem("checkpoint.folder", message, fix)])


def _described_folder(output_dir: Path) -> str | None:
    """Return the folder of checkpoints that a run's config.yaml states; None where there is none that can be read."""
    try:
        described: Any = yaml.safe_load((output_dir / "config.yaml").read_text())
        return str(described["checkpoint"]["folder"] or output_dir / "checkpoints")
    except (OSError, yaml.YAMLError, KeyError, TypeError, UnicodeDecodeError):
        return None


def find_checkpoint(location: str, key: str) -> Path | str:
    """Return the checkpoint that a user named by a step's folder, a folder of steps or a run's folder (path or URL), as `key`.

    A Hugging Face folder, `hf:<folder>`, stays as it is. Raises ConfigError if none there is complete.
    """
    fix = "give a step-… folder, or the folder of a run that has saved one"
    folder = hugging_face_folder(location)
    if folder is not None:
        if not (folder / "config.json").is_file():
            message = f"'{folder}' holds no config.json, so it is no model folder of Hugging Face"
            raise ConfigError([Problem(key, message, "give the folder of a model, downloaded, as hf:<folder>")])
        return f"{HUGGING_FACE}{folder}"
    if not location:
        raise ConfigError([Problem(key, "is empty", fix)])
    location = location if is_remote(location) else str(local_path(location))
    try:
        if open_files(location).size(MANIFEST) is not None:
            return location if is_remote(location) else Path(location)
        found = find_latest(location) or find_latest(f"{location.rstrip('/')}/checkpoints")
    except UnreadableError as error:
        fix = "start again once it can be, or name another step, as a step-… folder"
        raise ConfigError([Problem(key, f"'{location}' can't be read: {error}", fix)]) from error
    except (OSError, ValueError, CheckpointError) as error:  # somebody else's folder, an unknown protocol, no name at all
        raise ConfigError([Problem(key, f"'{location}' can't be read: {error}", fix)]) from error
    if found is None:
        if not is_remote(location) and (Path(location) / "config.json").is_file():
            fix = f"it seems to be a model folder of Hugging Face: type {key}=hf:{location}"
        raise ConfigError([Problem(key, f"'{location}' holds no complete checkpoint", fix)])
    return found


def is_inside(checkpoint: Path | str, folder: str) -> bool:
    """Return whether a checkpoint is inside a run's checkpoint folder, or is that folder."""
    if is_remote(str(checkpoint)) or is_remote(folder):
        return f"{checkpoint}/".startswith(f"{folder.rstrip('/')}/")
    inner, outer = (local_path(place).resolve() for place in (checkpoint, folder))
    return inner.is_relative_to(outer)


def is_named(checkpoint: Path | str, resume: str) -> bool:
    """Return whether a checkpoint is the folder that `resume` names, and not one that was found in it or beside it."""
    if is_remote(str(checkpoint)) or is_remote(resume):
        return str(checkpoint).rstrip("/") == resume.rstrip("/")
    one, other = (local_path(place).resolve() for place in (checkpoint, resume))
    return one == other


def is_import(state: Mapping[str, Any]) -> bool:
    """Return whether a checkpoint was made by `meshloom checkpoint import`, and so has no progress to resume."""
    return "progress" not in state


def carried_tokenizer(checkpoint: Path | str, manifest: Manifest) -> Path | None:
    """Return the tokenizer that an import has brought with it; None where there is none on a mounted file system."""
    if is_remote(str(checkpoint)) or manifest.state.get("tokenizer") is None:
        return None
    folder = hugging_face_folder(checkpoint) or Path(checkpoint)
    places = (folder, folder / step_name(manifest.step))
    return next((place / "tokenizer.json" for place in places if (place / "tokenizer.json").is_file()), None)


def tokenizer_beside(checkpoint: Path | str) -> Path | None:
    """Return the tokenizer.json that lies in a checkpoint's folder, or in one of the two above it; None where there is none."""
    foreign = hugging_face_folder(checkpoint)
    if foreign is None and is_remote(str(checkpoint)):
        return None
    step = Path(checkpoint)
    places = (step, step.parent, step.parent.parent) if foreign is None else (foreign,)
    return next((place / "tokenizer.json" for place in places if (place / "tokenizer.json").is_file()), None)


def saved_progress(state: Mapping[str, Any]) -> Progress:
    """Return the counters and the batch's history of a run's checkpoint.

    A run that began in a stage may have had another first batch than `batch.samples`.
    """
    samples = state["config"]["batch"].get("samples")
    return Progress.from_state(state["progress"], samples if isinstance(samples, int) else state["progress"]["batch"])


def _holds_checkpoint(folder: str) -> bool:
    if not _has_keepers(folder):
        return bool(steps_newest_first(open_files(folder)))
    from ..checkpoint.restore import holds_checkpoint

    return holds_checkpoint(folder)


def checkpoint_manifest(checkpoint: Path | str) -> Manifest:
    """Return the manifest of a checkpoint. Raises CheckpointError where it is damaged. Needs no torch for one on the disk."""
    if hugging_face_folder(checkpoint) is None and not _has_keepers(str(checkpoint)):
        found = read_newest(checkpoint)
        if found is None:
            raise CheckpointError(f"{checkpoint}: there is no complete checkpoint here")
        return found
    from ..checkpoint.restore import read_manifest

    return read_manifest(checkpoint)


def _has_keepers(folder: str) -> bool:
    """Return whether processes that keep snapshots in memory are registered in a folder of checkpoints."""
    return not is_remote(folder) and any((local_path(folder) / KEEPERS).glob("*.json"))
