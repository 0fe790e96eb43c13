"""The best run of several, and the command that goes on with it."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from ...config.compose import quoted
from ...config.keys import Side
from ...config.structured import literal
from ...trainer.schema import RunConfig, make_composer
from ...trainer.sides import key_sides
from ...trainer.stages.written import written_value
from ...trainer.typed import plain_config, typed_config
from .collect import ReportedRun
from .tables import final_loss, flat


def find_winner(runs: Sequence[ReportedRun]) -> ReportedRun | None:
    """Return the run with the lowest final loss, of those that have finished where any has; None where none has a loss."""
    finished = [run for run in runs if run.finished and final_loss(run) is not None]
    known = finished or [run for run in runs if final_loss(run) is not None]
    return min(known, key=lambda run: final_loss(run) or 0.0) if known else None


def typed_run(run: ReportedRun) -> RunConfig | None:
    """Return the config of a run as dataclasses; None where today's Meshloom does not take it.

    Groups that its version of Meshloom did not have are as in a config of today.
    """
    if not run.config:
        return None
    own = cast(DictConfig, OmegaConf.create(literal(run.config)))
    absent = [field.name for field in dataclasses.fields(RunConfig) if field.name not in run.config]
    today = make_composer().compose([]).config if absent else {}
    for name in absent:
        if name in today:
            own[name] = today[name]
    config, problems = typed_config(own)
    return None if problems else config


def sides_of(runs: Sequence[ReportedRun]) -> dict[str, str]:
    """Return key → side, of the configs that can be typed."""
    sides: dict[str, str] = {}
    for run in runs:
        config = typed_run(run)
        sides |= {key: str(side) for key, side in key_sides(config).items()} if config is not None else {}
    return sides


def continue_command(run: ReportedRun) -> str | None:
    """Return the command line that goes on with a run, to twice its length; None if the run does not say what it is.

    The recipe comes from its checkpoint. Its placement is typed where it is not the recipe file's own.
    """
    config, length = typed_run(run), run.length
    if config is None or length is None or not run.config.get("recipe"):
        return None
    unit, amount = length
    recipe = f"recipe={written_value(run.config['recipe'])}"
    words = [recipe, f"output_dir={quoted(str(run.run.folder))}", "resume=auto", f"trainer.{unit}={2 * amount}"]
    return " ".join(["meshloom train", *map(_shell_word, [*words, *_placement(config, recipe)])])


def _shell_word(word: str) -> str:
    """Quote a word for a shell, by double quotes where it holds Hydra's single ones."""
    return f'"{word}"' if "'" in word and not set(word) & set('"$`\\!') else shlex.quote(word)


def _placement(config: RunConfig, recipe: str) -> list[str]:
    """Return the words for the layout and launch of a run, where its recipe file has others."""
    composition = make_composer().compose([recipe])
    if composition.problems:  # a recipe of the user's own, in a folder that the run's files do not name
        return []
    usual = _flat_config(typed_config(composition.config)[0])
    sides = key_sides(config)
    return [
        f"{key}={written_value(value)}"
        for key, value in _flat_config(config).items()
        if key.partition(".")[0] in ("parallel", "launch", "batch")
        and sides.get(key) is Side.PLACEMENT
        and value != usual.get(key)
    ]


def _flat_config(config: RunConfig) -> Mapping[str, Any]:
    return dict(flat(plain_config(config)))
