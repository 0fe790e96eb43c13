"""Resolve a command line, once per process: the config to run, the checkpoint to resume from, and all problems."""

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
    """One run, ready to start if it has no problems.

    config      typed; values left to a scaling law are numbers
    checkpoint  to resume from; None: a fresh start
    world_size  number of its processes; 0: not known
    problems    everything that a person must change
    notices     messages to log at the start
    """

    config: RunConfig
    checkpoint: Path | str | None
    world_size: int
    problems: tuple[Problem, ...]
    notices: tuple[str, ...] = ()

    def refuse(self) -> None:
        """Raise ConfigError if there are problems."""
        if self.problems:
            raise ConfigError(self.problems)


@dataclass(frozen=True)
class ResolveOptions:
    """What a command asks of `resolve`.

    processes       config → number of the run's processes; 0: not known
    resumes         whether to resume from the checkpoint that `resume` names; a plan, for example, ignores it
    data_elsewhere  report problems of the data's files as notices only: they may lie on another machine
    more            config → further problems, of the machine for example
    """

    processes: Callable[[RunConfig], int]
    resumes: bool = True
    data_elsewhere: bool = False
    more: Callable[[RunConfig], Sequence[Problem]] = lambda _: ()


def resolve(overrides: Sequence[str], options: ResolveOptions, config_dir: str | None = None) -> ResolvedRun:
    """Return the run that a command line describes. Raises ConfigError if no config can be composed."""
    composer = make_composer(config_dir)
    return resolve_composed(composer, composer.compose(overrides), overrides, options)


def resolve_composed(
    composer: Composer, composition: Composition, overrides: Sequence[str], options: ResolveOptions
) -> ResolvedRun:
    """Return the run of a composed command line: see `resolve`."""
    expand_home(composition.config)
    checkpoint: Path | str | None = None
    notices: list[str] = []
    refused: list[Problem] = []
    if options.resumes:
        try:
            checkpoint, state = _read_checkpoint(composition.config)
            if state is not None:
                composition, notices = _compose_resumed(composer, composition, overrides, state)
        except ConfigError as error:
            refused = error.problems
    config, untyped = typed_config(composition.config)
    known = [*composition.problems, *refused, *untyped]
    world_size = options.processes(config)
    elsewhere: list[Problem] = []
    found = run_problems(config, world_size, known, elsewhere=elsewhere if options.data_elsewhere else None)
    found += [problem for problem in options.more(config) if problem not in found]
    return ResolvedRun(config, checkpoint, world_size, tuple(found), (*composition.notices, *notices, *map(str, elsewhere)))


def _read_checkpoint(config: DictConfig) -> tuple[Path | str | None, dict[str, Any] | None]:
    """Return the checkpoint to resume from, and its state; no state for an import."""
    checkpoint = checkpoint_to_resume(config)
    if checkpoint is None:
        return None, None
    try:
        state = checkpoint_state(checkpoint)
    except CheckpointError as error:
        fix = "name another one as resume=<path>, or begin anew with resume=none"
        raise ConfigError([Problem("resume", f"there is no going on from '{checkpoint}': {error}", fix)]) from error
    return checkpoint, None if is_import(state) else state


def _compose_resumed(
    composer: Composer, composition: Composition, overrides: Sequence[str], state: dict[str, Any]
) -> tuple[Composition, list[str]]:
    """Return the composition of a resumed run, and notices about it."""
    saved = saved_config(state)
    if choices := saved_choices(saved, composition.config, overrides, composer.options("recipe")):
        composition = composer.compose([*choices, *overrides])
        composition.notices.clear()  # about options that the run already has
        expand_home(composition.config)
    bad = {problem.key for problem in composition.problems}
    good = [line for line in overrides if line.partition("=")[0].lstrip("+~") not in bad and line not in bad]
    config, notices = resume_config(saved, composition.config, good)
    expand_home(config)
    return Composition(config, composition.problems, composition.notices), notices


def compose_config(overrides: Sequence[str], config_dir: str | None = None) -> tuple[RunConfig, list[Problem]]:
    """Return the typed config of a command line, and the problems of composing it. Checks nothing else."""
    composition = make_composer(config_dir).compose(overrides)
    config, untyped = typed_config(composition.config)
    return config, [*composition.problems, *untyped]


def expand_home(config: DictConfig) -> None:
    """Expand ~ in the folders of a config: shells do so in some places only, and not in recipe files."""
    for key in FOLDERS:
        written = OmegaConf.select(config, key)
        if isinstance(written, str) and written.startswith("~"):
            OmegaConf.update(config, key, os.path.expanduser(written))  # noqa: PTH111 (a text stays one, as written)
