"""Going on from a checkpoint: which one, under which config, and the state put back."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf

from ..checkpoint.errors import CheckpointError
from ..checkpoint.files import is_remote, open_files
from ..checkpoint.folder import find_latest
from ..checkpoint.manifest import MANIFEST
from ..checkpoint.restore import RestoreReport, holds_checkpoint, read_state, restore
from ..config.compose import differences, drop_unknown, resumed
from ..config.problems import ConfigError, Problem
from ..config.renames import with_moved_targets
from ..data.node import DataNode
from ..optim.progress import Progress
from ..parallel.fragment import Fragment
from .build import Run, build_control, checkpoint_folder
from .hooks.base import named
from .identity import Origin, is_own
from .loop import Loop
from .schema import RunConfig

log = logging.getLogger(__name__)


FROM = "auto:"
FOLDERS = ("output_dir", "checkpoint.folder", "checkpoint.snapshot_folder", "parallel.offload_path")


def goes_on(resume: str) -> bool:
    """Whether a run with this `resume` goes on with what it has saved itself, whenever there is something."""
    return resume == "auto" or resume.startswith(FROM)


def resumes_own(resume: str) -> bool:
    """Whether this process goes on with what the run has saved: it was told so, or torchrun has restarted it."""
    return goes_on(resume) or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def checkpoint_to_resume(config: DictConfig) -> Path | str | None:
    """The checkpoint that `resume` names.

    "none" is none; "auto" the run's own folder of them, or none yet; "auto:<path>" that folder too, but where the run has saved
    nothing yet, it begins from the path: what a job that is queued again and again says, when it fine-tunes or branches off.

    Processes that torchrun has restarted go on from what the run itself saved, whatever it began from.
    Raises ConfigError if a path was given that holds no complete checkpoint, or a folder can't be looked into.
    """
    wanted = str(config.resume)
    if resumes_own(wanted):
        folder = checkpoint_folder(config)  # not a step: `restore` passes over a damaged one, and asks the keepers' memory
        try:
            if holds_checkpoint(folder):
                return folder
        except (OSError, CheckpointError) as error:
            fix = "give a checkpoint.folder, or an output_dir, that can be"
            raise ConfigError([Problem("checkpoint.folder", f"'{folder}' can't be read: {error}", fix)]) from error
    return None if wanted in ("auto", "none") else find_checkpoint(wanted.removeprefix(FROM), "resume")


def find_checkpoint(location: str, key: str) -> Path | str:
    """The checkpoint that a user named by a step's folder, a folder of steps or a run's folder (path or URL), as `key`.

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


def effective(config: DictConfig, overrides: Sequence[str]) -> tuple[DictConfig, Path | str | None]:
    """What a command line really asks for: the config to run, and the checkpoint to go on from (None: a fresh start).

    config: composed of the recipe and the overrides. A resumed run has its checkpoint's config with the overrides on top;
    one that begins from imported weights has its own. In both, folders begin at the user's home where they are written so.

    Raises ConfigError where there is no such checkpoint, or where it is damaged.
    """
    _expand_home(config)
    checkpoint = checkpoint_to_resume(config)
    if checkpoint is None:
        return config, None
    try:
        state = read_state(checkpoint)
    except CheckpointError as error:
        fix = "name another one as resume=<path>, or begin anew with resume=none"
        raise ConfigError([Problem("resume", f"there is no going on from '{checkpoint}': {error}", fix)]) from error
    if _is_import(state):
        return config, checkpoint
    saved = with_moved_targets(state["config"])
    typed, kept = OmegaConf.structured(RunConfig), resumed(saved, config, overrides)
    for key in drop_unknown(kept):
        log.info("resumed run leaves out %s, which is no key of this version", key)
    merged = cast(DictConfig, OmegaConf.merge(typed, kept))
    _expand_home(merged)
    for line in differences(saved, config, merged):
        log.info("resumed run keeps %s", line)
    return merged, checkpoint


def _expand_home(config: DictConfig) -> None:
    """Shells expand ~ in some places only, and in a recipe nobody does."""
    for key in FOLDERS:
        written = OmegaConf.select(config, key)
        if isinstance(written, str) and written.startswith("~"):
            OmegaConf.update(config, key, os.path.expanduser(written))  # noqa: PTH111 (a text stays one, as written)


def lies_in(checkpoint: Path | str, folder: str) -> bool:
    """Whether a checkpoint is one of those in a run's folder, or that folder."""
    if is_remote(str(checkpoint)) or is_remote(folder):
        return f"{checkpoint}/".startswith(f"{folder.rstrip('/')}/")
    inner, outer = (Path(str(place).removeprefix("file://")).resolve() for place in (checkpoint, folder))
    return inner.is_relative_to(outer)


def restore_run(run: Run, checkpoint: Path | str, folder: str, *, strict: bool) -> Origin:
    """Put a checkpoint's arrays and counters into a freshly built run; of imported ones (fine-tuning), the weights alone.

    folder: of the run's own checkpoints. Of another run's, what belongs to that one (`Hook.of_one_run`) is left to it.
    strict: refuse optimizer state that does not fit (CheckpointError). Otherwise what fits is loaded and the rest reported.
    """
    loop = run.loop
    stated = read_state(checkpoint)
    if _is_import(stated):
        report = _restore_weights(loop, checkpoint)
        return Origin(report.run, report.step, report.commit, own=False)
    _same_tokens(stated, run.data, checkpoint)
    loop.engine.prepare_restore()
    report = _restore(loop, checkpoint, list(loop.engine.fragments()), strict=strict)
    _refuse_other_weights(loop, checkpoint, report)
    state, known = report.state, loop.engine.counters()
    counters = known.keys() ^ state["counters"].keys()
    if loop.mesh.is_main and (lost := [*report.missing, *report.mismatched, *report.unused, *counters]):
        log.warning(
            "begun anew or left out, because it does not fit: %s", ", ".join(sorted({key.split("/")[0] for key in lost}))
        )
    if state["data_fingerprint"] != run.data.fingerprint:
        samples = state["progress"]["samples"]
        log.warning("the data differs from the checkpoint's: the run goes on at sample %d of the new data", samples)
    loop.engine.load_counters({name: value for name, value in state["counters"].items() if name in known})
    loop.progress = Progress.from_state(state["progress"], _first_batch(state))
    # A run that goes on under a measuring controller keeps the size it had come to, whatever had chosen that.
    loop.controller.load_state_dict({"target": loop.progress.batch, **state["controller"]})
    own = lies_in(checkpoint, folder) and is_own(report.run, folder)
    for name, hook in named(loop.hooks).items():
        if own or not hook.of_one_run:
            hook.load_state_dict(state["hooks"].get(name, {}))
    return Origin(report.run, report.step, report.commit, own)


def _first_batch(state: dict[str, Any]) -> int:
    """Samples of a run's first step, as the config of a checkpoint tells; a stage that begins the run may have another."""
    samples = state["config"]["batch"].get("samples")
    return samples if isinstance(samples, int) else state["progress"]["batch"]


def _same_tokens(state: dict[str, Any], data: DataNode, checkpoint: Path | str) -> None:
    """Raise ConfigError where a token id would now mean another piece of text than the model has learnt."""
    saved, now = state.get("tokenizer"), None if data.tokenizer is None else data.tokenizer.fingerprint
    if saved is None or now is None or saved == now:
        return
    message = f"the text is cut into other tokens than '{checkpoint}' was trained on"
    fix = "keep the run's own with data.tokenizer=<its output_dir>/tokenizer.json, or go on with the data it had"
    raise ConfigError([Problem("data.tokenizer", message, fix)])


def _restore(loop: Loop, checkpoint: Path | str, fragments: list[Fragment], *, strict: bool) -> RestoreReport:
    """Restore on all ranks, each byte read by one of them. The others get it through a process group that lives for this."""
    group = dist.new_group(backend="gloo") if loop.mesh.layout.world_size > 1 else None
    assert not isinstance(group, int), "every process is a member"
    try:
        return restore(checkpoint, fragments, build_control(loop.mesh, "restore"), strict=strict, group=group)
    finally:
        if group is not None:
            dist.destroy_process_group(group)


def _is_import(state: dict[str, Any]) -> bool:
    """Whether a checkpoint was not saved by a run (`meshloom checkpoint import`): it has no progress to go on from."""
    return "progress" not in state


def _restore_weights(loop: Loop, checkpoint: Path | str) -> RestoreReport:
    """Begin a run from imported weights: step 0, fresh optimizer state. Raises ConfigError on all ranks if some don't fit."""
    weights = [fragment for fragment in loop.engine.fragments() if fragment.role == "weight"]
    report = _restore(loop, checkpoint, weights, strict=False)
    _refuse_other_weights(loop, checkpoint, report)
    loop.engine.load_counters(loop.engine.counters())
    return report


def _refuse_other_weights(loop: Loop, checkpoint: Path | str, report: RestoreReport) -> None:
    """Raise ConfigError on all ranks if some rank has a weight that the checkpoint has not, or in another shape."""
    absent = sorted(key for key in {*report.missing, *report.mismatched} if key.startswith("weight/"))
    if loop.mesh.any(bool(absent)):
        named = f" ({', '.join(absent[:4])}{', …' if len(absent) > 4 else ''})" if absent else ""
        fix = "choose the model whose weights they are"
        raise ConfigError([Problem("resume", f"'{checkpoint}' does not have this model's weights{named}", fix)])
