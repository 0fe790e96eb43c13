"""Resolve a command line, once per process: the config to run, the checkpoint to resume from, and all problems."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ..checkpoint.errors import UNREADABLE_FIX, CheckpointError, UnreadableError
from ..checkpoint.manifest import Manifest
from ..config.compose import Composer, Composition
from ..config.problems import ConfigError, Problem
from ..config.structured import literal
from ..data.config import TRAINED
from ..optim.progress import BEGINNING, Progress
from ..planner.cluster import ClusterConfig
from .checkpoint_fit import checkpoint_problems
from .derived import checkpoint_folder
from .find_checkpoint import carried_tokenizer, checkpoint_manifest, checkpoint_to_resume, is_import, saved_progress
from .fitting import Fitting
from .imported_config import import_config
from .imported_model import ImportedModel, imported_model
from .local_relations import local_notices
from .measured_steps import measuring_notices
from .resumed_config import Resumed, resume_config, saved_choices, saved_config
from .ring_exchange import ring_notices
from .schema import RunConfig, make_composer
from .stages.configs import (
    StageConfig,
    border_problems,
    length_problems,
    prefixed,
    stage_configs,
    typed_notices,
    with_length,
)
from .stages.record import Place, StageRecord, stage_at
from .stages.typed_words import Words, held_words
from .stages.written import Stage, read_stages
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
    typed       words of this start, and of earlier ones, that its checkpoints keep for the options of later stages
    fitted      key → value that a plan decided, where the config says auto
    imported    what it keeps of the Hugging Face model that it, or a run before it, began from; None: nothing
    place       of a run with stages: the stage that it is in
    then        the runs of the stages after it, each of which resumes from the one before
    """

    config: RunConfig
    checkpoint: Path | str | None
    world_size: int
    problems: tuple[Problem, ...]
    notices: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    choices: Mapping[str, str] = field(default_factory=dict[str, str])
    typed: tuple[str, ...] = ()
    fitted: Mapping[str, Any] = field(default_factory=dict[str, Any])
    imported: ImportedModel | None = None
    place: Place | None = None
    then: tuple[ResolvedRun, ...] = ()

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
    builds           whether to build a config on trial
    machine          config → the GPUs for which values that are left to a plan are decided; None: there are none
    tokenizer        a file with which text is cut, where the resumed run's data would train a tokenizer; None: it trains one
    """

    processes: Callable[[RunConfig], int]
    resumes: bool = True
    data_elsewhere: bool = False
    more: Callable[[RunConfig], Sequence[Problem]] = lambda _: ()
    before_building: Callable[[RunConfig], None] = lambda _: None
    builds: Callable[[RunConfig], bool] = lambda _: True
    machine: Callable[[RunConfig], ClusterConfig | None] = lambda _: None
    tokenizer: Path | None = None


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
    unread = {problem.key for problem in composition.problems}
    overrides = [word for word in overrides if word not in unread]  # what can't be read is a problem of the composition
    resumed, words = Resumed(composition.config, choices=composition.choices), Words(overrides)
    refused: list[Problem] = []
    if options.resumes:
        try:
            checkpoint, manifest = _read_checkpoint(composition.config)
            if manifest is not None:
                assert checkpoint is not None
                tokenizer = carried_tokenizer(checkpoint, manifest)
                composition, resumed, words = _compose_resumed(composer, composition, overrides, manifest.state, tokenizer)
                if options.tokenizer is not None and OmegaConf.select(resumed.config, "data.tokenizer") == TRAINED:
                    resumed.config.data.tokenizer = literal(str(options.tokenizer))
        except ConfigError as error:
            refused = error.problems
    stages, faults = read_stages(OmegaConf.to_container(resumed.config.stages, resolve=True))
    checking = Checking(options, manifest, [*composition.problems, *refused, *faults], compares=not refused)
    if stages:
        found = _resolve_stages(composer, words, resumed, stages, checkpoint, checking)
    else:
        if not faults and checking.compares:
            checking.known += checking.record.absent()
        found = checking.resolved(resumed, checkpoint)
    imported = None if checkpoint is None or manifest is None else imported_model(checkpoint, manifest)
    kept = () if found.problems else words.kept(found.config)
    then = tuple(replace(run, imported=imported, typed=kept) for run in found.then)
    return replace(found, notices=(*composition.notices, *found.notices), imported=imported, typed=kept, then=then)


def _resolve_stages(
    composer: Composer,
    words: Words,
    start: Resumed,
    stages: Sequence[Stage],
    checkpoint: Path | str | None,
    checking: Checking,
) -> ResolvedRun:
    """Return the run of the stage that a run is in, with those of the stages after it.

    start: the config before the changes of the stages
    """
    progress, record = checking.progress, checking.record
    now = stage_at(stages, progress.tokens)
    checking.known += [*length_problems(start.config), *record.problems(stages, progress.tokens, checking.saved_stages)]
    start = replace(start, config=with_length(start.config, stages))
    found = list(stage_configs(composer, words.all, start, stages))
    for each in found[: now + 1]:
        checking.known += each.problems
    place = Place(tuple(stages), now).begun(record.at(stages, now, progress, start.config.data.seq_len))
    notices = [*start.notices, *typed_notices(stages[: now + 1], words.typed), *words.notices(stages[now:])]
    notices += [notice for each in found for notice in each.left_out]
    first = checking.resolved(replace(found[now].resumed, notices=notices, warnings=start.warnings), checkpoint, place)
    runs = [first]
    for each in found[now + 1 :]:
        place = Place(tuple(stages), each.stage.number)
        runs.append(checking.later(each, runs[-1].config, place))
    problems = tuple(problem for run in runs for problem in run.problems)
    return replace(first, problems=problems, then=tuple(replace(run, problems=()) for run in runs[1:]))


@dataclass
class Checking:
    """The checks of one command line's run: of the stage that it is in, then of the stages after it.

    manifest  of the checkpoint that it resumes from
    known     problems found so far
    compares  whether the config is that of the resumed run, which then must fit the checkpoint
    """

    options: ResolveOptions
    manifest: Manifest | None
    known: list[Problem]
    compares: bool = True

    @property
    def progress(self) -> Progress:
        """The progress that the run starts from."""
        state = None if self.manifest is None else self.manifest.state
        return BEGINNING if state is None or is_import(state) else saved_progress(state)

    @property
    def record(self) -> StageRecord:
        """The stages that the checkpoint has begun."""
        return StageRecord() if self.manifest is None else StageRecord.from_state(self.manifest.state)

    @property
    def saved_stages(self) -> list[Stage]:
        """The stages as the checkpoint states them."""
        return [] if self.manifest is None else read_stages(self.manifest.state.get("config", {}).get("stages"))[0]

    def resolved(self, resumed: Resumed, checkpoint: Path | str | None, place: Place | None = None) -> ResolvedRun:
        """Return the run of a config, with its problems."""
        config, untyped = typed_config(resumed.config)
        self.known += untyped
        if self.manifest is not None and self.compares:
            self.known += checkpoint_problems(self.manifest, config)
        run = self._checked(config, resumed, checkpoint, place, self.progress, self.known, self.options.before_building)
        self.known = list(run.problems)
        return run

    def later(self, found: StageConfig, before: RunConfig, place: Place) -> ResolvedRun:
        """Return the run of a later stage, with the problems that its changes add. before: the config of the stage before."""
        stage, (config, untyped) = found.stage, typed_config(found.resumed.config)
        run = self._checked(config, found.resumed, None, place, BEGINNING, untyped, lambda _: None)
        added = [*found.problems, *border_problems(before, config, stage), *prefixed(stage, run.problems, self.known)]
        self.known += run.problems
        return replace(run, problems=tuple(added))

    def _checked(
        self,
        config: RunConfig,
        resumed: Resumed,
        checkpoint: Path | str | None,
        place: Place | None,
        progress: Progress,
        known: Sequence[Problem],
        before_building: Callable[[RunConfig], None],
    ) -> ResolvedRun:
        elsewhere: list[Problem] = []
        world_size = self.options.processes(config)
        fitting = Fitting(self.options.machine)
        config, found = checked_config(
            config,
            world_size,
            known,
            elsewhere=elsewhere if self.options.data_elsewhere else None,
            progress=progress,
            place=place,
            more=self.options.more,
            before_building=before_building,
            builds=self.options.builds,
            fitting=fitting,
        )
        notices = (*resumed.notices, *fitting.notices, *map(str, elsewhere))
        notices += () if "optim" in config.unusable else tuple(local_notices(config.optim.local))
        notices += (*measuring_notices(config), *ring_notices(config))
        warnings, choices = tuple(resumed.warnings), resumed.choices
        return ResolvedRun(
            config, checkpoint, world_size, tuple(found), notices, warnings, choices, fitted=fitting.values, place=place
        )


def _read_checkpoint(config: DictConfig) -> tuple[Path | str | None, Manifest | None]:
    """Return the checkpoint to resume from, and its manifest."""
    checkpoint = checkpoint_to_resume(config)
    if checkpoint is None:
        return None, None
    try:
        return checkpoint, checkpoint_manifest(checkpoint)
    except CheckpointError as error:
        fix = "name another one as resume=<path>, or begin anew with resume=none"
        if isinstance(error, UnreadableError):  # which may pass, and resume=none would put the run's steps aside
            named = "start again once it can be read, or name another one as resume=<path>"
            fix = UNREADABLE_FIX if checkpoint == checkpoint_folder(config) else named
        raise ConfigError([Problem("resume", f"there is no going on from '{checkpoint}': {error}", fix)]) from error


def _compose_resumed(
    composer: Composer, composition: Composition, overrides: Sequence[str], state: dict[str, Any], tokenizer: Path | None
) -> tuple[Composition, Resumed, Words]:
    """Return the composition of a command line that resumes, the config of the resumed run, and the words of its stages."""
    saved, recorded, words = saved_config(state), state.get("choices", {}), Words(overrides)
    own = not is_import(state)
    if own and saved.get("stages"):
        saved["trainer"]["tokens"] = None  # the stages give the length
    if own and (choices := saved_choices(saved, recorded, composition.config, overrides, composer.has_option)):
        words = Words(overrides, choices)
        composition = composer.compose(words.all, with_notices=False)
        composition.notices.clear()  # as the others, they are about options that the run already has
        expand_home(composition.config)
    bad = {problem.key for problem in composition.problems}
    good = [line for line in overrides if line.partition("=")[0].lstrip("+~") not in bad and line not in bad]
    resumed = resume_config(saved, composition, good, recorded) if own else import_config(state, composition, good, tokenizer)
    expand_home(resumed.config)
    if own and resumed.config.recipe == saved.get("recipe"):
        words = replace(words, held=held_words(state, good))
    return composition, resumed, words


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
