"""Compose a config from recipes and overrides with Hydra, and report all faulty overrides at once.

Hydra stops at the first override that it can't take. `compose` finds all of them: misspelt choices of groups are found by
their names, then each value is put into the config of the choices by itself. A composition takes Hydra a seventh of a second,
so overrides are composed one by one only where that does not tell (`+key`, `~key`, sweeps, dictionaries, faulty recipe files).

Only public parts of Hydra are used: `initialize_config_module`, the loader that it sets up, `hydra.searchpath` for a user's
folder, and the parser of overrides.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from hydra import initialize_config_module
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from .duration import Unit, parse_count
from .fixes import current_value, in_full, reason_of, unknown_key
from .group_schemas import GroupSchemas
from .keys import field_of
from .overrides import is_plain, key_of, parse_overrides, quoted, swept_overrides, written
from .problems import ConfigError, Problem
from .tree import delete_key, drop_unknown, keys_in

RECIPES_MODULE = "meshloom.recipes"
RECIPES = f"pkg://{RECIPES_MODULE}"
RECIPE_FOLDER = Path(__file__).parent.parent / "recipes"
ROOT = "config"
HYDRA_VERSION = "1.3"
FAULTS = (HydraException, yaml.YAMLError, ValueError)  # what composition raises for bad overrides and bad files

LAUNCHERS = "hydra/launcher"
EXTRAS = {"submitit": "submitit"}
"""First word of a launcher of sweeps → the extra of Meshloom that brings it."""


@dataclass(frozen=True)
class Composition:
    """Result of composing a command line.

    config     the run's config, without the faulty overrides
    problems   one for every faulty override
    notices    messages about keys of recipe files that were left out
    choices    group → the option that was chosen for it, by the recipe or on the command line
    """

    config: DictConfig
    problems: list[Problem]
    notices: list[str] = field(default_factory=list[str])
    choices: dict[str, str] = field(default_factory=dict[str, str])


def _config_loader() -> ConfigLoader:
    """Return Hydra's loader for Meshloom's recipes. Restores the Hydra state of a program that is itself a Hydra app."""
    state = GlobalHydra.instance()
    outer = state.hydra
    state.clear()
    try:
        with initialize_config_module(RECIPES_MODULE, version_base=HYDRA_VERSION):
            return GlobalHydra.instance().config_loader()
    finally:
        if outer is not None:
            GlobalHydra.instance().initialize(outer)


class Composer:
    """Composes configs from Meshloom's recipes and a user's folder of further ones."""

    def __init__(self, config_dir: str | None = None, options: Mapping[str, Sequence[type]] | None = None) -> None:
        """Raises ConfigError when `config_dir` does not exist.

        config_dir: folder of further recipes (`--config-dir`); options: group → the schemas of its options.
        """
        self._schemas = GroupSchemas(options or {})
        self._joined: list[str] = []  # override that adds the user's folder to Hydra's search path
        if config_dir is not None:
            folder = Path(config_dir).resolve()
            if not folder.is_dir():
                raise ConfigError(
                    [Problem("--config-dir", f"'{folder}' is not a folder", "give the folder that holds recipe/")]
                )
            self._joined = [f"hydra.searchpath=[{quoted(f'file://{folder}')}]"]
        self._loader = _config_loader()
        self._known_options: dict[str, list[str]] = {}

    def compose(self, overrides: Sequence[str], with_notices: bool = True) -> Composition:
        """Compose the config of these overrides. Raises ConfigError if the recipe itself can't be composed.

        with_notices: those about values of the recipe for another option take one more composition
        """
        problems: list[Problem] = []
        existing = self._existing(parse_overrides(overrides, self._loader, problems), problems)
        parsed = [self._in_full(each) for each in existing]
        deletions = [each for each in parsed if each.is_delete() and not each.is_hydra_override()]
        parsed = [each for each in parsed if each not in deletions]
        composition = self._composed(parsed, problems)
        for override in deletions:
            self._delete(override.key_or_group, composition)
        problems = composition.problems
        for key in drop_unknown(composition.config):  # "+key=…" lets Hydra add any
            problems.append(unknown_key(key, keys_in(composition.config)))
        typed = {key_of(override) for override in parsed}
        for group in self._schemas:
            if isinstance(composition.config.get(group), DictConfig):
                found, notices = self._schemas.leave_out(group, composition.config, typed)
                problems += found
                composition.notices.extend(notices)
                if with_notices and group in typed and not problems:  # which would end the run, and can't be composed again
                    composition.notices.extend(self._foreign_values(group, composition.config[group], parsed))
        return composition

    def _composed(self, parsed: Sequence[Override], problems: list[Problem]) -> Composition:
        """Return the composition of the overrides that can be taken, and add a problem for each of the others."""
        try:
            config, choices = self._load(written(parsed))
            return Composition(config, problems, choices=choices)
        except FAULTS:
            return self._without_faults(parsed, problems)

    def _delete(self, key: str, composition: Composition) -> None:
        """Delete a key of a user's own class. A declared key would get its default instead, which is a problem."""
        if self._schemas.declares(key, composition.config):
            composition.problems.append(Problem(key, "can't be deleted", self._schemas.default_fix(key, self.options(key))))
        elif not delete_key(composition.config, key):
            composition.problems.append(unknown_key(key, keys_in(composition.config)))

    def _foreign_values(self, group: str, node: Any, parsed: Sequence[Override]) -> Iterator[str]:
        """Yield a notice for each value that the recipe wrote for its own option of a group, where another one was typed."""
        changed = self._schemas.changed_keys(group, node, {key_of(override) for override in parsed})
        if changed:
            others = [override for override in parsed if key_of(override).partition(".")[0] != group]
            base = self._load(written(others))[0][group]
            yield from self._schemas.written_for_another(group, node, base, changed)

    def expand(self, overrides: Sequence[str]) -> list[list[str]]:
        """Return the overrides of each job of a sweep (`-m`); one job if nothing is swept."""
        problems: list[Problem] = []
        parsed = [*parse_overrides(overrides, self._loader, problems)]
        problems += [
            Problem(override.get_key_element(), "an interval has no list of values", "write them: key=1,2,3 or key=range(1,4)")
            for override in parsed
            if override.is_interval_sweep()
        ]
        if problems:
            raise ConfigError(problems)
        hydra = [override.input_line or "" for override in parsed if override.is_hydra_override()]
        task = [override for override in parsed if not override.is_hydra_override()]
        return [[*hydra, *job] for job in itertools.product(*map(swept_overrides, task))]

    def _load(self, overrides: list[str]) -> tuple[DictConfig, dict[str, str]]:
        """Return the composed config, and the option that it has of each group."""
        config = self._loader.load_configuration(ROOT, [*self._joined, *overrides], RunMode.RUN)
        made: dict[str, Any] = {str(group): option for group, option in config.hydra.runtime.choices.items()}
        with open_dict(config):
            del config["hydra"]
        return config, {group: option for group, option in made.items() if group in self._schemas and option is not None}

    def _existing(self, overrides: Iterable[Override], problems: list[Problem]) -> Iterator[Override]:
        """Yield the overrides. One that chooses an option that does not exist becomes a problem, and chooses the nearest.

        So keys that depend on the choice are checked as meant.
        """
        for override in overrides:
            group, value = override.key_or_group, override.value()
            options = [] if not isinstance(value, str) or self._is_there(group, value) else self.options(group)
            if not options or value in options:
                yield override
                continue
            if (extra := EXTRAS.get(str(value).partition("_")[0])) and group == LAUNCHERS:
                problems.append(Problem(group, f"'{value}' is not installed", f"pip install 'meshloom[{extra}]'", lacks=extra))
                continue
            near = difflib.get_close_matches(str(value), options, 1)
            hint = f"did you mean {group}={near[0]}? " if near else ""
            problems.append(Problem(group, f"there is no '{value}'", f"{hint}There are: {', '.join(options)}"))
            if near:
                yield from OverridesParser.create().parse_overrides([f"{group}={near[0]}"])

    def _in_full(self, override: Override) -> Override:
        """Return an override with a number such as 1.5B written in full, where its key is a number of steps or tokens."""
        unit, value = self._unit(override.key_or_group), override.value()
        if unit is None or not isinstance(value, str | float):
            return override
        try:
            count = parse_count(value, unit)
        except ValueError:
            return override  # which Hydra refuses
        return OverridesParser.create().parse_override(f"{override.get_key_element()}={count}")

    def _unit(self, key: str) -> Unit | None:
        """Return the unit with which a key is declared, if it is a whole number of one."""
        found = field_of(self._schemas.run, key)
        return None if found is None else found.metadata.get("unit")

    def _without_faults(self, overrides: Sequence[Override], problems: list[Problem]) -> Composition:
        """Return the composition of the overrides that can be taken, with a problem for each of the others."""
        first = [override for override in overrides if self._is_choice(override)]
        values = [override for override in overrides if override not in first]
        if all(map(is_plain, values)):
            try:
                config, choices = self._load(written(first))
            except FAULTS:
                return self._one_by_one([*first, *values], problems)
            for override in values:
                try:
                    OmegaConf.update(config, override.key_or_group, override.value(), merge=True)
                except OmegaConfBaseException as error:
                    problems.append(self._diagnose(override, error, config))
            return Composition(config, problems, choices=choices)
        return self._one_by_one([*first, *values], problems)

    def _one_by_one(self, overrides: Sequence[Override], problems: list[Problem]) -> Composition:
        """Compose with one override more at a time, and leave out those that fail."""
        good: list[str] = []
        try:
            config, choices = self._load(good)
        except FAULTS as error:
            raise ConfigError([*problems, Problem("recipes", *reason_of(error))]) from error
        for line, override in zip(written(overrides), overrides, strict=True):
            try:
                config, choices = self._load([*good, line])
                good.append(line)
            except FAULTS as error:
                problems.append(self._diagnose(override, error, config))
        return Composition(config, problems, choices=choices)

    def _is_there(self, group: str, option: str) -> bool:
        """Return whether nobody needs to ask Hydra for the options of a group, which takes its time."""
        is_group = group in (*self._schemas, "recipe") or "/" in group
        return not is_group or option.startswith("base_") or (RECIPE_FOLDER / group / f"{option}.yaml").is_file()

    def options(self, group: str) -> list[str]:
        """Return the options of a recipe group, without their schemas; none if there is no such group."""
        if "." in group:  # a key inside a group
            return []
        if group not in self._known_options:
            options = self._loader.get_group_options(group, config_name=ROOT, overrides=self._joined)
            self._known_options[group] = [name for name in options if not name.startswith("base_")]
        return self._known_options[group]

    def has_option(self, group: str, option: str) -> bool:
        """Return whether a recipe group has an option. For Meshloom's own ones Hydra, which takes its time, is not asked."""
        return (RECIPE_FOLDER / group / f"{option}.yaml").is_file() or option in self.options(group)

    def _is_choice(self, override: Override) -> bool:
        return bool(self.options(override.key_or_group)) and isinstance(override.value(), str | None)

    def _diagnose(self, override: Override, error: Exception, config: DictConfig) -> Problem:
        """Return the problem of an override that `config`, composed without it, could not take."""
        key = key_of(override)
        if self._is_choice(override):
            return Problem(f"{key}={override.value()}", *reason_of(error))
        current = OmegaConf.select(config, key, default=_ABSENT)
        if current is _ABSENT and not override.is_add():
            return unknown_key(key, keys_in(config))
        if override.is_sweep_override():
            fix = f"add -m to sweep over it, or write a list as {key}=[1,2] and a text as {key}='\"1,2\"'"
            return Problem(key, f"'{override.input_line}' has several values", fix)
        if (unit := self._unit(key)) is not None and isinstance(override.value(), str | float | bool):
            return Problem(key, f"'{override.value()}' is no number of {unit.value}", "write it as 1500000 or 1.5M")
        message, fix = reason_of(error)
        return Problem(key, message, in_full(key, message) or fix or current_value(key, current))


_ABSENT = object()
