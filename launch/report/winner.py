"""The best run of several, and the command that goes on with it."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from ...config.keys import Side
from ...config.overrides import quoted
from ...config.structured import literal
from ...trainer.schema import RunConfig, make_composer
from ...trainer.sides import key_sides
from ...trainer.stages.written import Stage, read_stages, written_value
from ...trainer.typed import plain_config, typed_config
from ..ranking import compared_losses, ranked
from .collect import ReportedRun
from .tables import ABSENT


def find_winner(runs: Sequence[ReportedRun]) -> ReportedRun | None:
    """Return the run that ranks first; None where none has a loss."""
    standings = [run.standing for run in runs]
    best = ranked(standings)[0]
    return runs[best] if compared_losses(standings)[best] is not None else None


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


@dataclass(frozen=True)
class Continuation:
    """The command line that goes on with a run, to twice its length.

    line  None where there is none
    note  what the line lacks, or why there is none; "" if it is whole
    """

    line: str | None
    note: str = ""


def continue_command(run: ReportedRun) -> Continuation:
    """Write the command line that goes on with a run.

    The recipe comes from its checkpoint. Its placement is typed where it is not the recipe file's own. A run with stages goes
    on with a longer last stage.
    """
    config, length = typed_run(run), run.length
    if config is None or length is None or not run.config.get("recipe"):
        return Continuation(None, "its config does not name a recipe and a length, or today's Meshloom does not take it")
    unit, amount = length
    stages, faults = read_stages(run.config.get("stages"))
    if faults:
        return Continuation(None, str(faults[0]))
    longer = f"trainer.{unit}={2 * amount}"
    if stages:
        longer = f"{stages[-1].key}.tokens={2 * stages[-1].end - stages[-1].begin}"
    recipe = f"recipe={written_value(run.config['recipe'])}"
    words, note = _placement(config, recipe, stages)
    words = [recipe, f"output_dir={quoted(str(run.run.folder))}", "resume=auto", longer, *words]
    return Continuation(" ".join(["meshloom train", *map(_shell_word, words)]), note)


def _shell_word(word: str) -> str:
    """Quote a word for a shell, by double quotes where it holds Hydra's single ones."""
    return f'"{word}"' if "'" in word and not set(word) & set('"$`\\!') else shlex.quote(word)


def _placement(config: RunConfig, recipe: str, stages: Sequence[Stage]) -> tuple[list[str], str]:
    """Return the words for the placement of a run, where its recipe file has another; and which of it they lack.

    What a stage changes is left to the stage.
    """
    composition, note = make_composer().compose([recipe]), ""
    if composition.problems:  # a recipe of the user's own, in a folder that the run's files do not name
        composition = make_composer().compose([])
        note = "its recipe file is not known here: placement is typed where it is not Meshloom's default"
    usual, own = (plain_config(each) for each in (typed_config(composition.config)[0], config))
    changed = [
        key
        for key, side in key_sides(config).items()
        if side is Side.PLACEMENT
        and key not in ("output_dir", "resume")
        and not any(stage.touches(key) for stage in stages)
        and _value(own, key) != _value(usual, key)
    ]
    missing = [key for key in changed if _value(usual, key) is ABSENT]  # of an option that the recipe file does not choose
    if missing:
        note = "; ".join([*filter(None, [note]), f"not typed, because the recipe file has no such key: {', '.join(missing)}"])
    words = [f"{key}={written_value(_value(own, key))}" for key in changed if key not in missing]
    return words, note


def _value(tree: Mapping[str, Any], key: str) -> Any:
    """Return the value of a key with dots; `ABSENT` without it."""
    found: Any = tree
    for name in key.split("."):
        if not isinstance(found, Mapping) or name not in found:
            return ABSENT
        found = cast(Mapping[str, Any], found)[name]
    return found
