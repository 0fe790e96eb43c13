"""The config of each stage: that of the stage before it, resumed with the stage's changes as typed words."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf, open_dict

from ...config.compose import Composer
from ...config.problems import ConfigError, Problem
from ...models.config import DecoderConfig
from ..checkpoint_fit import changed_shape, optimizer_change
from ..resumed_config import Resumed, resume_config, typed_values
from ..schema import RunConfig
from ..typed import plain_config
from .written import Stage, written_value


@dataclass(frozen=True)
class StageConfig:
    """One stage, the config that it trains under, and what is wrong with its changes.

    left_out: notices of words, typed or of a stage before it, that mean nothing to an option which it chooses
    """

    stage: Stage
    resumed: Resumed
    problems: list[Problem] = field(default_factory=list[Problem])
    left_out: list[str] = field(default_factory=list[str])


def stage_configs(composer: Composer, words: Sequence[str], start: Resumed, stages: Sequence[Stage]) -> Iterator[StageConfig]:
    """Yield the config of each stage, in order.

    words: of the command line and of earlier ones, with the checkpoint's choices
    start: the config before the first of these stages; of a resumed run the checkpoint's. What a stage names, it sets again
    """
    now, said, known = start, list(words), list[Problem]()
    for stage in stages:
        found = _changed(composer, said, now, stage)
        said += stage.words
        yield replace(found, problems=prefixed(stage, found.problems, known))
        now, known = found.resumed, [*known, *found.problems]


def _changed(composer: Composer, words: Sequence[str], before: Resumed, stage: Stage) -> StageConfig:
    """Return the config of a stage, as far as its changes can be taken, and the problems of the others.

    words: all that come before those of the stage
    """
    if not stage.changes:
        return StageConfig(stage, replace(before, notices=[], warnings=[]))
    try:
        fresh = composer.compose([*words, *stage.words])
    except ConfigError as error:
        return StageConfig(stage, before, error.problems)
    others = typed_values(words).keys() - typed_values(stage.words).keys()
    problems, left_out = list[Problem](), list[str]()
    for problem in fresh.problems:
        key = problem.key.partition("=")[0]
        if stage.touches(key) and key in others:
            left_out.append(f"{stage.key}: {key} is left out, because {problem.message}")
        elif stage.touches(key):
            problems.append(problem)
    bad = {problem.key.partition("=")[0] for problem in problems}
    good = [word for word, key in zip(stage.words, stage.changes, strict=True) if key not in bad]
    saved = cast(dict[str, Any], OmegaConf.to_container(before.config, resolve=True, throw_on_missing=False))
    found = resume_config(saved, fresh, good, before.choices)
    return StageConfig(stage, Resumed(found.config, choices=found.choices), problems, left_out)


def with_length(config: DictConfig, stages: Sequence[Stage]) -> DictConfig:
    """Return a config whose length is that of all stages."""
    found = config.copy()
    with open_dict(found):
        found.trainer.steps, found.trainer.tokens = None, stages[-1].end
    return found


def length_problems(config: DictConfig) -> Iterator[Problem]:
    """Yield a problem for each key that gives the length of a run whose stages give it."""
    for name in ("steps", "tokens"):
        value = config.trainer[name]
        if value is not None:
            yield Problem(f"trainer.{name}", f"{value} is a second length beside that of the stages", "set it to null")


def typed_notices(begun: Sequence[Stage], overrides: Iterable[str]) -> Iterator[str]:
    """Yield a notice for each typed key to which a stage that has begun gives another value: the stage's stands."""
    typed = typed_values(overrides)
    named = {key: stage for stage in begun for key in stage.changes}
    for key, value in typed.items():
        if key in named and named[key].changes[key] != value:
            stands = f"{key}={written_value(named[key].changes[key])} of stage '{named[key].name}' stands over what is typed"
            yield f"{stands}; {named[key].key}.{key}=… changes it"


def border_problems(before: RunConfig, now: RunConfig, stage: Stage) -> Iterator[Problem]:
    """Yield the keys that a stage changes and that a run can't change: of the model's shape, and the optimizer."""
    if not {"model", "optim"} & {*before.unusable, *now.unusable}:
        if isinstance(before.model, DecoderConfig) and isinstance(now.model, DecoderConfig):
            for key in changed_shape(asdict(before.model), asdict(now.model)):
                fix = "leave it out: the weights of a run have one shape"
                yield Problem(f"{stage.key}.model.{key}", "can't change in the middle of a run", fix)
        state: Mapping[str, Any] = {"config": plain_config(before), "progress": {}}
        if (change := optimizer_change(state, now)) is not None:
            message = f"the run has the state of {change[0]}, which means nothing to {change[1]}"
            yield Problem(f"{stage.key}.optim", message, "change its values, and keep the optimizer")


def prefixed(stage: Stage, problems: Iterable[Problem], known: Iterable[Problem]) -> list[Problem]:
    """Return the problems that a stage adds to those known of the stages before it, under its key."""
    said = {(problem.key, problem.message) for problem in known}
    added = (problem for problem in problems if (problem.key, problem.message) not in said)
    return [replace(problem, key=f"{stage.key}.{problem.key}") for problem in added]
