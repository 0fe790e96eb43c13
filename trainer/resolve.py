"""What a command line really asks for, found once per process: the config to run, where it goes on from, all its problems."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ..checkpoint.errors import CheckpointError
from ..config.compose import Composer, Composition
from ..config.problems import ConfigError, Problem
from .find_checkpoint import checkpoint_state, checkpoint_to_resume, is_import
from .resumed_config import resume_config, saved_choices, saved_config
from .schema import RunConfig, make_composer
from .typed import typed_config
from .validate import run_problems

FOLDERS = ("output_dir", "checkpoint.folder", "checkpoint.snapshot_folder", "parallel.offload_path")


@dataclass(frozen=True)
class ResolvedRun:
    """One run, ready to be started if it has no problems.

    config      typed; values that were left to a law are numbers
    checkpoint  to go on from; None: a fresh start
    world_size  number of its processes; 0: not known
    problems    everything that a person must change
    notices     what to say at the start
    """

    config: RunConfig
    checkpoint: Path | str | None
    world_size: int
    problems: tuple[Problem, ...]
    notices: tuple[str, ...] = ()

    def refuse(self) -> None:
        """Raise ConfigError where there are problems."""
        if self.problems:
            raise ConfigError(self.problems)


def resolve(
    overrides: Sequence[str],
    config_dir: str | None = None,
    *,
    processes: Callable[[RunConfig], int],
    resumes: bool = True,
    data_elsewhere: bool = False,
    more: Callable[[RunConfig], Sequence[Problem]] = lambda _: (),
) -> ResolvedRun:
    """Return the run that a command line asks for. Raises ConfigError where not even a config can be composed.

    processes  number of the run's processes, by its config; 0: not known
    resumes    whether a checkpoint that `resume` names is gone on from; a plan, say, is one of the words alone
    data_elsewhere  what is wrong with the data's files is a notice only: they may lie on another machine
    more       further problems of the machine, asked with the others
    """
    composer = make_composer(config_dir)
    composition = composer.compose(overrides)
    asked: dict[str, Any] = {"processes": processes, "resumes": resumes, "data_elsewhere": data_elsewhere, "more": more}
    return resolve_composed(composer, composition, overrides, **asked)


def resolve_composed(
    composer: Composer,
    composition: Composition,
    overrides: Sequence[str],
    *,
    processes: Callable[[RunConfig], int],
    resumes: bool = True,
    data_elsewhere: bool = False,
    more: Callable[[RunConfig], Sequence[Problem]] = lambda _: (),
) -> ResolvedRun:
    """Return the run of a command line that has been composed: see `resolve`."""
    expand_home(composition.config)
    checkpoint: Path | str | None = None
    notices: list[str] = []
    refused: list[Problem] = []
    if resumes:
        try:
            checkpoint, state = _found(composition.config)
            if state is not None:
                composition, notices = _resumed(composer, composition, overrides, state)
        except ConfigError as error:
            refused = error.problems
    config, untyped = typed_config(composition.config)
    known = [*composition.problems, *refused, *untyped]
    world_size = processes(config)
    elsewhere: list[Problem] = []
    found = run_problems(config, world_size, known, elsewhere=elsewhere if data_elsewhere else None)
    found += [problem for problem in more(config) if problem not in found]
    return ResolvedRun(config, checkpoint, world_size, tuple(found), (*composition.notices, *notices, *map(str, elsewhere)))


def _found(config: DictConfig) -> tuple[Path | str | None, dict[str, Any] | None]:
    """Return the checkpoint to go on from, and its state where a run saved it (not an import)."""
    checkpoint = checkpoint_to_resume(config)
    if checkpoint is None:
        return None, None
    try:
        state = checkpoint_state(checkpoint)
    except CheckpointError as error:
        fix = "name another one as resume=<path>, or begin anew with resume=none"
        raise ConfigError([Problem("resume", f"there is no going on from '{checkpoint}': {error}", fix)]) from error
    return checkpoint, None if is_import(state) else state


def _resumed(
    composer: Composer, composition: Composition, overrides: Sequence[str], state: dict[str, Any]
) -> tuple[Composition, list[str]]:
    """Return the composition of a run that goes on, and what to say about it."""
    saved = saved_config(state)
    if choices := saved_choices(saved, composition.config, overrides):
        composition = composer.compose([*choices, *overrides])
        composition.notices.clear()  # they are about options that the run has had all the time
        expand_home(composition.config)
    bad = {problem.key for problem in composition.problems}
    good = [line for line in overrides if line.partition("=")[0].lstrip("+~") not in bad and line not in bad]
    config, notices = resume_config(saved, composition.config, good)
    expand_home(config)
    return Composition(config, composition.problems, composition.notices), notices


def compose_config(overrides: Sequence[str], config_dir: str | None = None) -> tuple[RunConfig, list[Problem]]:
    """Return the typed config of the words alone, not judged further, and the problems that came up on the way."""
    composition = make_composer(config_dir).compose(overrides)
    config, untyped = typed_config(composition.config)
    return config, [*composition.problems, *untyped]


def expand_home(config: DictConfig) -> None:
    """Shells expand ~ in some places only, and in a recipe nobody does."""
    for key in FOLDERS:
        written = OmegaConf.select(config, key)
        if isinstance(written, str) and written.startswith("~"):
            OmegaConf.update(config, key, os.path.expanduser(written))  # noqa: PTH111 (a text stays one, as written)
