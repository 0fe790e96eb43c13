"""The Python API: train and export as the commands do, with values in place of words and exceptions in place of exit codes."""

from __future__ import annotations

import signal
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from ..config.problems import ConfigError, Problem
from .run_folder import Run


class TrainingFailed(RuntimeError):
    """A run that did not reach its end. What went wrong has been printed.

    code    the exit code that `meshloom train` would have had
    folder  of the run
    """

    def __init__(self, code: int, folder: Path) -> None:
        super().__init__(f"the run in {folder} ended with exit code {code}; what it said stands above")
        self.code, self.folder = code, folder


class TrainingStopped(RuntimeError):
    """A run that was asked to stop by a signal, and has saved. `resume=auto` goes on with it.

    number  of the signal: SIGTERM, or SIGUSR1, which SLURM sends before a job's time is up
    folder  of the run
    """

    def __init__(self, number: signal.Signals, folder: Path) -> None:
        super().__init__(f"the run in {folder} was asked to stop by {number.name}, and has saved; resume=auto goes on with it")
        self.number, self.folder = number, folder


def train(*words: str, config_dir: str | Path | None = None, **keys: Any) -> Run:
    """Train as `meshloom train` does, and return the run.

        train("recipe=quickstart", "optim.lr=3e-3")
        train(recipe="quickstart", optim={"lr": 3e-3}, launch={"nproc": 2})

    words       as on the command line
    config_dir  a folder of further recipes
    keys        keys of the config with their values; those of a group as a dictionary

    A run of one process trains in this process; for several, torchrun is started and waited for. A signal, or Ctrl-C in a
    notebook, lets the run finish its step and save; then TrainingStopped is raised, or KeyboardInterrupt after Ctrl-C. Signals
    go to the main thread, so only that can train.

    Raises ConfigError with every problem of a config that can't run, TrainingFailed for a run that did not reach its end, and
    whatever else ends a run of this process.
    """
    from ..trainer.resolve import resolve
    from ..trainer.run import run
    from ..trainer.signals import StopRequest
    from ..trainer.stages.border import collect_memory
    from .rank import configure_log
    from .train import RESOLVING, processes_for_torchrun, run_by_torchrun, start_problems, tell_other_machines

    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("meshloom.train needs the main thread, where signals arrive; give each run a process of its own")
    typed = [*words, *override_words(keys)]
    folder_of_recipes = None if config_dir is None else str(config_dir)
    resolved = resolve(typed, RESOLVING, folder_of_recipes)
    collect_memory()  # of an earlier run of this process, before what is free is asked
    if problems := resolved.problems or start_problems(resolved):
        error = ConfigError(problems)
        tell_other_machines(error, resolved.config)
        raise error
    stop = StopRequest()
    configure_log()
    if processes_for_torchrun(resolved.config.launch):
        code = run_by_torchrun(resolved, typed, folder_of_recipes, stop)
    else:
        try:
            code = run(resolved, stop)
        finally:
            collect_memory()  # other work of this process may need it
    folder = Path(resolved.config.output_dir)
    if stop.obeyed and stop.number == signal.SIGINT:
        raise KeyboardInterrupt
    if code:
        raise TrainingFailed(code, folder)
    if stop.obeyed:
        raise TrainingStopped(signal.Signals(stop.number), folder)
    return Run(folder)


def override_words(keys: Mapping[str, Any]) -> list[str]:
    """Write keys and values as words of the command line; a dictionary that is in no list is a group, or a node of one.

    Raises ConfigError for values that are none of a config.
    """
    from ..trainer.stages.written import written_value

    words: list[str] = []
    problems: list[Problem] = []
    for key, value in _flat(keys):
        plain = _plain(value)
        if _is_plain(plain):
            words.append(f"{key}={written_value(plain)}")
        else:
            fix = "give text, numbers, true or false, or lists of them and of dictionaries with plain names as keys"
            problems.append(Problem(key, f"{value!r} is no value of a config", fix))
    if problems:
        raise ConfigError(problems)
    return words


def _flat(keys: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Return keys with their values. A dictionary by numbers is one value."""
    found: list[tuple[str, Any]] = []
    for name, value in keys.items():
        if isinstance(value, Mapping) and value and all(isinstance(each, str) for each in cast(Mapping[Any, Any], value)):
            found += _flat(cast(Mapping[str, Any], value), f"{prefix}{name}.")
        else:
            found.append((f"{prefix}{name}", value))
    return found


def _plain(value: Any) -> Any:
    """Return paths as text, tuples and arrays as lists, scalars of NumPy as Python's own, also inside of others."""
    from ..config.lazy import numpy as np

    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in cast(Mapping[Any, Any], value).items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in cast(Sequence[Any], value)]
    return str(value) if isinstance(value, Path) else value


def _is_plain(value: Any) -> bool:
    from ..trainer.stages.written import reads_as_text

    if isinstance(value, list):
        return all(map(_is_plain, cast(list[Any], value)))
    if isinstance(value, dict):
        pairs = cast(dict[Any, Any], value).items()
        names_are_plain = all(type(name) is int or (isinstance(name, str) and reads_as_text(name)) for name, _ in pairs)
        return names_are_plain and all(_is_plain(each) for _, each in pairs)
    return value is None or isinstance(value, str | bool | int | float)


def export(checkpoint: str | Path, folder: str | Path, *, dtype: str | None = None, family: str | None = None) -> Path:
    """Write a checkpoint's weights, config and tokenizer as a model folder of Hugging Face. Return the folder.

    checkpoint  a step-… folder, a folder of them or a run's (the newest complete one is taken)
    dtype       bf16, fp16 or fp32; default: as stored
    family      the `model_type` to export as; default: as imported, or the first that fits

    Raises ConfigError where there is no checkpoint, and CheckpointError for a model that no family holds, or where the folder
    exists.
    """
    from ..checkpoint.convert.hugging_face.exporting import export as write
    from ..checkpoint.files import open_files
    from ..trainer.find_checkpoint import find_checkpoint

    return write(open_files(find_checkpoint(str(checkpoint), "checkpoint")), Path(folder), dtype=dtype, family=family)
