"""Configs from the command line's words."""

from __future__ import annotations

from meshloom.trainer.resolve import ResolvedRun, ResolveOptions, resolve_composed
from meshloom.trainer.schema import RunConfig, make_composer
from meshloom.trainer.typed import typed_config
from meshloom.trainer.validate import run_problems


def config_of(*words: str) -> RunConfig:
    """The typed config of words that can be composed."""
    composition = make_composer().compose(words)
    assert not composition.problems, composition.problems
    config, untyped = typed_config(composition.config)
    assert not untyped, untyped
    return config


def problems_of(world_size: int, *words: str) -> dict[str, str]:
    """Key → problem, of words that can be composed."""
    composition = make_composer().compose(words)
    assert not composition.problems, composition.problems
    config, untyped = typed_config(composition.config)
    return {problem.key: str(problem) for problem in run_problems(config, world_size, untyped)}


def resolve_words(base: list[str], overrides: list[str], world_size: int = 1, config_dir: str | None = None) -> ResolvedRun:
    """The run of these words, of which the base ones stand for a recipe: they are not typed."""
    composer = make_composer(config_dir)
    composition = composer.compose([*base, *overrides])
    assert not composition.problems, composition.problems
    return resolve_composed(composer, composition, overrides, ResolveOptions(lambda _: world_size))
