"""Configs from the command line's words."""

from __future__ import annotations

from collections.abc import Sequence

from meshloom.config.compose import Composer, Composition
from meshloom.trainer.resolve import ResolvedRun, ResolveOptions, resolve_composed
from meshloom.trainer.schema import OPTIONS, RunConfig, make_composer, register_schemas
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


class RecipeComposer(Composer):
    """Composes words behind those that stand for a recipe file, also when a resume composes anew."""

    def __init__(self, recipe: Sequence[str], config_dir: str | None) -> None:
        register_schemas()
        super().__init__(config_dir, OPTIONS)
        self._recipe = recipe

    def compose(self, overrides: Sequence[str], with_notices: bool = True) -> Composition:
        replaced = {word.partition("=")[0] for word in overrides}
        recipe = [word for word in self._recipe if word.partition("=")[0] not in replaced]
        return super().compose([*recipe, *overrides], with_notices)


def resolve_words(base: list[str], overrides: list[str], world_size: int = 1, config_dir: str | None = None) -> ResolvedRun:
    """The run of these words, of which the base ones stand for a recipe: they are not typed."""
    composer = RecipeComposer(base, config_dir)
    composition = composer.compose(overrides)
    assert not composition.problems, composition.problems
    return resolve_composed(composer, composition, overrides, ResolveOptions(lambda _: world_size))
