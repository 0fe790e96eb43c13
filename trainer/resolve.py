"""Resolve a command line, once per process: the config to run, the checkpoint to resume from, and all problems."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ..checkpoint.errors import CheckpointError
from ..checkpoint.manifest import Manifest
from ..config.compose import Composer, Composition
from ..config.problems import ConfigError, Problem
from ..optim.progress import BEGINNING
from .checkpoint_fit import checkpoint_problems
from .find_checkpoint import carried_tokenizer, checkpoint_manifest, checkpoint_to_resume, is_import, saved_progress
from .imported_config import import_config
from .imported_model import ImportedModel, imported_model
from .resumed_config import Resumed, resume_config, saved_choices, saved_config
from .schema import RunConfig, make_composer
from .typed import typed_config
from .validate import checked_config

FOLDERS = ("output_dir", "checkpoint.folder", "checkpoint.snapshot_folder", "parallel.offload_path")


@dataclass(frozen=True)
class ResolvedRun:
    """One run, ready to start if it has no problems.

    config      typed; values left to a scaling law are numbers
    checkpoint  to resume from; None: a fresh start
    world_size  number of its processes; 0: not known
    problems    everything that a person must change
    notices     messages to log at the start
    warnings    messages to log as warnings: changes that may be mistakes
    choices     group → the option that it has, as far as that is known
    imported    what it keeps of the Hugging Face model that it, or a run before it, began from; None: nothing
    """

    config: RunConfig
    checkpoint: Path | str | None
    world_size: int
    problems: tuple[Problem, ...]
    notices: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    choices: Mapping[str, str] = field(default_factory=dict[str, str])
    imported: ImportedModel | None = None

    def refuse(self) -> None:
        """Raise ConfigError if there are problems."""
        if self.problems:
            raise ConfigError(self.problems)


@dataclass(frozen=True)
class ResolveOptions:
    """The options with which a command calls `resolve`.

    processes        config → number of the run's processes; 0: not known
    resumes          whether to resume from the checkpoint that `resume` names; a plan, for example, ignores it
    data_elsewhere   report problems of the data's files as notices only: they may lie on another machine
    more             config → further problems that need no PyTorch, of the machine for example
    before_building  called with a config in which nothing was found without PyTorch, before it is built on trial
    """

    processes: Callable[[RunConfig], int]
    resumes: bool = True
    data_elsewhere: bool = False
    more: Callable[[RunConfig], Sequence[Problem]] = lambda _: ()
    before_building: Callable[[RunConfig], None] = lambda _: None


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
    manifest: Manifest | None = None
    resumed = Resumed(composition.config, choices=composition.choices)
    refused: list[Problem] = []
    if options.resumes:
        try:
            checkpoint, manifest = _read_checkpoint(composition.config)
            if manifest is not None:
                assert checkpoint is not None
                tokenizer = carried_tokenizer(checkpoint, manifest)
                composition, resumed = _compose_resumed(composer, composition, overrides, manifest.state, tokenizer)
        except ConfigError as error:
            refused = error.problems
    config, untyped = typed_config(resumed.config)
    known = [*composition.problems, *refused, *untyped]
    if manifest is not None:
        known += checkpoint_problems(manifest, config)
    world_size = options.processes(config)
    elsewhere: list[Problem] = []
    config, found = checked_config(
        config,
        world_size,
        known,
        elsewhere=elsewhere if options.data_elsewhere else None,
        progress=BEGINNING if manifest is None or is_import(manifest.state) else saved_progress(manifest.state),
        more=options.more,
        before_building=options.before_building,
    )
    notices = (*composition.notices, *resumed.notices, *map(str, elsewhere))
    imported = None if checkpoint is None or manifest is None else imported_model(checkpoint, manifest)
    warnings = tuple(resumed.warnings)
    return ResolvedRun(config, checkpoint, world_size, tuple(found), notices, warnings, resumed.choices, imported)


def _read_checkpoint(config: DictConfig) -> tuple[Path | str | None, Manifest | None]:
    """Return the checkpoint to resume from, and its manifest."""
    checkpoint = checkpoint_to_resume(config)
    if checkpoint is None:
        return None, None
    try:
        return checkpoint, checkpoint_manifest(checkpoint)
    except CheckpointError as error:
        fix = "name another one as resume=<path>, or begin anew with resume=none"
        raise ConfigError([Problem("resume", f"there is no going on from '{checkpoint}': {error}", fix)]) from error


def _compose_resumed(
    composer: Composer, composition: Composition, overrides: Sequence[str], state: dict[str, Any], tokenizer: Path | None
) -> tuple[Composition, Resumed]:
    """Return the composition of a command line that resumes, and the config of the resumed run."""
    saved, recorded = saved_config(state), state.get("choices", {})
    own = not is_import(state)
    if own and (choices := saved_choices(saved, recorded, composition.config, overrides, composer.options)):
        composition = composer.compose([*choices, *overrides])
        composition.notices.clear()  # about options that the run already has
        expand_home(composition.config)
    bad = {problem.key for problem in composition.problems}
    good = [line for line in overrides if line.partition("=")[0].lstrip("+~") not in bad and line not in bad]
    resumed = resume_config(saved, composition, good, recorded) if own else import_config(state, composition, good, tokenizer)
    expand_home(resumed.config)
    return composition, resumed


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
