"""Problems of this machine, as it is now: GPUs, folders, other runs in them. Imports no torch."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from ..checkpoint.files import is_remote, local_path
from ..checkpoint.lock import LOCK, holder_of, refusal
from ..config.problems import Problem
from ..config.words import counted
from .derived import checkpoint_folder
from .launching import gpu_count, run_processes, under_torchrun, visible_gpus
from .schema import RunConfig

RUN_LOCK = ".run.lock"  # not the checkpoints' lock, which may lie in the same folder


def machine_problems(config: RunConfig) -> list[Problem]:
    """Return the problems that keep this machine, as it is now, from running a config."""
    return [*process_problems(config, several_nodes=True), *(_folders(config) if os.environ.get("RANK", "0") == "0" else ())]


def unusable_gpus(config: RunConfig) -> list[Problem]:
    """Return a problem if PyTorch, which this imports, can use fewer of the visible GPUs than the run has processes."""
    local = _local_processes(config)
    if local == 1 or not visible_gpus() or (usable := gpu_count()) >= local:
        return []
    if usable:
        return [_too_few(local, usable)]
    if config.launch.nproc != "auto":
        return []
    message = f"auto counts {visible_gpus()} GPUs, and PyTorch can use none of them"
    return [Problem("launch.nproc", message, "install a PyTorch for these GPUs, or set launch.nproc=1 to train on the CPU")]


def _local_processes(config: RunConfig) -> int:
    return int(os.environ["LOCAL_WORLD_SIZE"]) if "LOCAL_WORLD_SIZE" in os.environ else run_processes(config.launch)


def _too_few(processes: int, gpus: int) -> Problem:
    fix = f"start at most {gpus}, or set CUDA_VISIBLE_DEVICES= to train on the CPU"
    return Problem("launch.nproc", f"{counted(processes, 'process')} for {counted(gpus, 'GPU')}", fix)


def process_problems(config: RunConfig, *, several_nodes: bool = False) -> Iterator[Problem]:
    """Yield the problems of starting a config's processes on this machine. several_nodes: whether others may take part."""
    local, gpus = _local_processes(config), visible_gpus()
    if local > 1 and 0 < gpus < local:
        yield _too_few(local, gpus)
    if not several_nodes and not under_torchrun() and config.launch.most_nodes > 1:
        yield Problem("launch.nodes", "this command starts the processes of one machine", "start torchrun on every machine")


def _folders(config: RunConfig) -> Iterator[Problem]:
    """Yield the problems of the folders and services that rank 0 writes to."""
    if config.logging.wandb:
        from .hooks.loggers.weights_and_biases import wandb_problems

        yield from wandb_problems()
    yield from _unwritable("output_dir", config.output_dir)
    if config.checkpoint.folder is not None and not is_remote(config.checkpoint.folder):
        yield from _unwritable("checkpoint.folder", str(local_path(config.checkpoint.folder)))
    yield from _taken(config)


def _taken(config: RunConfig) -> Iterator[Problem]:
    """Yield a problem for each folder that another run has locked. The run locks them itself, after its data is prepared.

    A machine may join a run that has its folders already: only the run's first process tells of another run then.
    """
    if config.launch.most_nodes > 1 and not under_torchrun():
        return
    folders = [("output_dir", str(config.output_dir), RUN_LOCK, "writing")]
    folder = checkpoint_folder(config)
    if config.checkpoint.every != 0 and not is_remote(folder):
        folders.append(("checkpoint.folder", str(local_path(folder)), LOCK, "saving"))
    for key, place, name, doing in folders:
        with contextlib.suppress(OSError):  # reported by `_unwritable`
            if (holder := holder_of(Path(place), name)) is not None:
                yield Problem(key, refusal(Path(place), doing, holder))


def _unwritable(key: str, folder: str) -> Iterator[Problem]:
    """Yield a problem if a folder, or the nearest one above it that exists, can't be written to."""
    place = Path(folder).absolute()
    try:
        while not _exists(place):
            place = place.parent
    except OSError as error:
        yield Problem(key, f"'{folder}' can't be made: {error.strerror}", "give a folder to write to")
        return
    if not place.is_dir():
        yield Problem(key, f"'{place}' is not a folder", "give a folder, or the name of a new one")
    elif not os.access(place, os.W_OK | os.X_OK):
        yield Problem(key, f"'{place}' can't be written to", "give a folder of your own")


def _exists(path: Path) -> bool:
    """Return whether a path exists. Raises OSError where that can't be told: a name too long, a folder without access."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True
