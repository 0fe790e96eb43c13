"""Compose a config from recipes and overrides with Hydra, and report all faulty overrides at once.

Hydra stops at the first override that it can't take. `compose` finds all of them: misspelt choices of groups are found by
their names, then each value is put into the config of the choices by itself. A composition takes Hydra a seventh of a second,
so overrides are composed one by one only where that does not tell (`+key`, `~key`, sweeps, dictionaries, faulty recipe files).

Only public parts of Hydra are used: `initialize_config_module`, the loader that it sets up, `hydra.searchpath` for a user's
folder, and the parser of overrides.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import json
import re
import typing
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from hydra import initialize_config_module
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from .duration import Unit, parse_count
from .keys import MISSING, field_of
from .problems import ConfigError, Problem
from .renames import RENAMED_KEYS

RECIPES_MODULE = "meshloom.recipes"
RECIPES = f"pkg://{RECIPES_MODULE}"
RECIPE_FOLDER = Path(__file__).parent.parent / "recipes"
ROOT = "config"
HYDRA_VERSION = "1.3"
NAMED = ("model", "data", "optim", "schedule", "batch")  # groups whose options carry a name
OPEN_NODES = tuple(
    f"{node}{mark}"
    for node in ("parallel.deepspeed.config", "optim.modules", "stages", "validation", "launch.sbatch", "launch.placements")
    for mark in ".="
)  # their keys are in no schema
FAULTS = (HydraException, yaml.YAMLError, ValueError)  # what composition raises for bad overrides and bad files

LAUNCHERS = "hydra/launcher"
EXTRAS = {"submitit": "submitit"}
"""First word of a launcher of sweeps → the extra of Meshloom that brings it."""

SCHEMA = "schema"
"""Name in Hydra's ConfigStore of the dataclass of the whole config, which `trainer/schema.py` registers."""


def run_schema() -> type:
    """Return the dataclass of the whole config."""
    kind = OmegaConf.get_type(ConfigStore.instance().load(f"{SCHEMA}.yaml").node)
    assert kind is not None
    return kind


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
        self._schemas = options or {}
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
        self._schema = run_schema()  # the store gives out a copy each time, which takes a hundredth of a second

    def compose(self, overrides: Sequence[str], with_notices: bool = True) -> Composition:
        """Compose the config of these overrides. Raises ConfigError if the recipe itself can't be composed.

        with_notices: those about values of the recipe for another option take one more composition
        """
        problems: list[Problem] = []
        existing = self._existing(_parse(overrides, self._loader, problems), problems)
        parsed = [self._in_full(each) for each in existing]
        deletions = [each for each in parsed if each.is_delete() and not each.is_hydra_override()]
        parsed = [each for each in parsed if each not in deletions]
        composition = self._composed(parsed, problems)
        for override in deletions:
            self._delete(override.key_or_group, composition)
        problems = composition.problems
        for key in drop_unknown(composition.config):  # "+key=…" lets Hydra add any
            problems.append(unknown_key(key, _keys(composition.config)))
        typed = {override.get_key_element().lstrip("+~") for override in parsed}
        for group in self._schemas:
            if isinstance(composition.config.get(group), DictConfig):
                self._leave_out(group, composition, typed)
                if with_notices and group in typed and not problems:  # which would end the run, and can't be composed again
                    composition.notices.extend(self._foreign_values(group, composition.config[group], parsed))
        return composition

    def _composed(self, parsed: Sequence[Override], problems: list[Problem]) -> Composition:
        """Return the composition of the overrides that can be taken, and add a problem for each of the others."""
        try:
            config, choices = self._load(_lines(parsed))
            return Composition(config, problems, choices=choices)
        except FAULTS:
            return self._without_faults(parsed, problems)

    def _delete(self, key: str, composition: Composition) -> None:
        """Delete a key of a user's own class. A declared key would get its default instead, which is a problem."""
        if self._declares(key, composition.config):
            composition.problems.append(Problem(key, "can't be deleted", self._default_fix(key)))
        elif not _delete(composition.config, key):
            composition.problems.append(unknown_key(key, _keys(composition.config)))

    def _declares(self, key: str, config: DictConfig) -> bool:
        """Return whether a key is declared, in this config. A node of a user's own class declares none."""
        group, _, inner = key.partition(".")
        if group not in self._schemas:
            return field_of(self._schema, key) is not None
        schema = self._schema_of(group, config.get(group))
        return not inner or (schema is not None and field_of(schema, inner) is not None)

    def _default_fix(self, key: str) -> str:
        """Word the fix for a key that can't be deleted: its default."""
        group, _, inner = key.partition(".")
        if group in self._schemas and not inner:
            return f"choose another option: {group}={', '.join(self.options(group))}"
        kinds, name = (self._schemas[group], inner) if group in self._schemas else ([self._schema], key)
        declared = [field for kind in kinds if (field := field_of(kind, name)) is not None]
        defaults = {json.dumps(field.default) for field in declared if isinstance(field.default, str | int | float | None)}
        default = defaults.pop().strip('"') if len(defaults) == 1 else MISSING  # options differ
        return "give it another value" if default == MISSING else f"write {key}={default}, its default"

    def _foreign_values(self, group: str, node: Any, parsed: Sequence[Override]) -> Iterator[str]:
        """Yield a notice for each value that the recipe wrote for its own option of a group, where another one was typed.

        Only keys whose defaults tell the two options apart are meant, such as the learning rate of an optimizer.
        """
        typed = {override.get_key_element().lstrip("+~") for override in parsed}
        schema = self._schema_of(group, node)
        if schema is None:
            return
        names = [
            one for one in _names(schema) if f"{group}.{one}" not in typed and one in node and one not in ("_target_", "name")
        ]
        changed = [one for one in names if node[one] != _default(schema, one) and self._tells_apart(group, one)]
        if not changed:
            return
        others = [override for override in parsed if override.get_key_element().lstrip("+~").partition(".")[0] != group]
        base: Any = self._load(_lines(others))[0][group]
        written_for = self._schema_of(group, base)
        if written_for is None or written_for is schema:
            return
        for name in changed:
            own = _default(schema, name)
            if base.get(name) == node[name] and own != _default(written_for, name):
                here, there = (f"{group}={_default(kind, 'name')}" for kind in (schema, written_for))
                yield f"{group}.{name}={node[name]} was written for {there}; {here} has {group}.{name}={own} of its own"

    def _schema_of(self, group: str, node: Any) -> type | None:
        path = node.get("_target_") if isinstance(node, DictConfig) else None
        return next((kind for kind in self._schemas[group] if _default(kind, "_target_") == path), None)

    def _tells_apart(self, group: str, name: str) -> bool:
        return len({str(_default(kind, name)) for kind in self._schemas[group] if name in _names(kind)}) > 1

    def _leave_out(self, group: str, composition: Composition, typed: Collection[str]) -> None:
        """Remove keys of a group that its option does not have.

        A notice for a key of another option that a recipe file gives; a problem for one that is typed, or that no option has.
        """
        node: Any = composition.config[group]
        path = OmegaConf.to_container(node).get("_target_")  # type: ignore[union-attr]
        schema = next((kind for kind in self._schemas[group] if _default(kind, "_target_") == path), None)
        if schema is None:  # a user's own class
            return
        known = _names(schema)
        for name in [str(name) for name in node if name not in known]:
            key = f"{group}.{name}"
            owners = [str(_default(kind, "name")) for kind in self._schemas[group] if name in _names(kind)]
            here = f"{group}={_default(schema, 'name')}"
            if not owners:
                shown = [f"{group}.{other}" for other in known if not other.startswith("_") and other != "name"]
                composition.problems.append(unknown_key(key, [group, *shown]))
            elif key in typed:
                fix = f"leave it out, or choose {' or '.join(f'{group}={owner}' for owner in owners[:3])}"
                composition.problems.append(Problem(key, f"{here} has no such key", fix))
            else:
                others = ", ".join(f"{group}={owner}" for owner in owners[:3])
                composition.notices.append(f"{key} of the recipe is left out: {here} has no such key ({others} has)")
            _delete(composition.config, key)

    def expand(self, overrides: Sequence[str]) -> list[list[str]]:
        """Return the overrides of each job of a sweep (`-m`); one job if nothing is swept."""
        problems: list[Problem] = []
        parsed = [*_parse(overrides, self._loader, problems)]
        problems += [
            Problem(override.get_key_element(), "an interval has no list of values", "write them: key=1,2,3 or key=range(1,4)")
            for override in parsed
            if override.is_interval_sweep()
        ]
        if problems:
            raise ConfigError(problems)
        hydra = [override.input_line or "" for override in parsed if override.is_hydra_override()]
        task = [override for override in parsed if not override.is_hydra_override()]
        return [[*hydra, *job] for job in itertools.product(*map(_values, task))]

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
                problems.append(Problem(group, f"'{value}' is not installed", f"pip install 'meshloom[{extra}]'"))
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
        found = field_of(self._schema, key)
        return None if found is None else found.metadata.get("unit")

    def _without_faults(self, overrides: Sequence[Override], problems: list[Problem]) -> Composition:
        """Return the composition of the overrides that can be taken, with a problem for each of the others."""
        first = [override for override in overrides if self._is_choice(override)]
        values = [override for override in overrides if override not in first]
        if all(map(_is_plain, values)):
            try:
                config, choices = self._load(_lines(first))
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
        for line, override in zip(_lines(overrides), overrides, strict=True):
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
        key = override.get_key_element().lstrip("+~")
        if self._is_choice(override):
            return Problem(f"{key}={override.value()}", *reason_of(error))
        current = OmegaConf.select(config, key, default=_ABSENT)
        if current is _ABSENT and not override.is_add():
            return unknown_key(key, _keys(config))
        if override.is_sweep_override():
            fix = f"add -m to sweep over it, or write a list as {key}=[1,2] and a text as {key}='\"1,2\"'"
            return Problem(key, f"'{override.input_line}' has several values", fix)
        if (unit := self._unit(key)) is not None and isinstance(override.value(), str | float | bool):
            return Problem(key, f"'{override.value()}' is no number of {unit.value}", "write it as 1500000 or 1.5M")
        message, fix = reason_of(error)
        return Problem(key, message, _in_full(key, message) or fix or _current_value(key, current))


_ABSENT = object()


def _in_full(key: str, message: str) -> str:
    """Word the fix for a whole number that is written as 1e9 or 1.5B; "" for another error of Hydra's."""
    written = re.match(r"Value '(.+)' of type '\w+' could not be converted to Integer", message)
    try:
        return f"write a whole number in full: {key}={parse_count(written[1], Unit.STEPS):_}" if written else ""
    except ValueError:
        return ""


def _lines(overrides: Iterable[Override]) -> list[str]:
    """Return overrides as they are written."""
    return [override.input_line or "" for override in overrides]


def _is_plain(override: Override) -> bool:
    """Return whether an override gives an existing key one value, which is no dictionary."""
    marked = override.is_add() or override.is_force_add() or override.is_delete() or override.is_hydra_override()
    special = marked or override.is_sweep_override() or override.package is not None
    return not special and not isinstance(override.value(), dict)


def _names(kind: type) -> list[str]:
    return [one.name for one in dataclasses.fields(kind)]


def _default(kind: type, name: str) -> Any:
    return next((one.default for one in dataclasses.fields(kind) if one.name == name), None)


def unknown_key(key: str, known: Iterable[str]) -> Problem:
    """Return the problem of an unknown key, with its new name or near misses as the fix."""
    if key in RENAMED_KEYS:
        return Problem(key, "has another name now", f"write {RENAMED_KEYS[key]}")
    return Problem(key, "there is no such key", near_miss(key, known))


def _current_value(key: str, value: Any) -> str:
    """Word the fix for a bad value: the value without the override."""
    if isinstance(value, DictConfig) and value:
        return f"set one of its keys: {', '.join(f'{key}.{name}' for name in value)}"
    if isinstance(value, DictConfig | ListConfig):
        return f"here it is {key}={OmegaConf.to_container(value)}"
    return f"here it is {OmegaConf.to_yaml(OmegaConf.create([value]))[2:].strip()}"


def near_miss(key: str, known: Iterable[str]) -> str:
    """Word the fix for a misspelt key: the nearest known keys of the same group, or else keys with the same last name."""
    known = list(known)
    parent, _, leaf = key.rpartition(".")
    siblings = {name.rpartition(".")[2]: name for name in known if name.rpartition(".")[0] == parent}
    near = [siblings[match] for match in difflib.get_close_matches(leaf, siblings, 2)]
    near = near or [name for name in known if name.rpartition(".")[2] == leaf]
    if not near and parent and siblings:
        return f"{parent} has: {', '.join(siblings)}"
    near = near or difflib.get_close_matches(key, known, 2)
    return f"did you mean {' or '.join(near[:2])}?" if near else "see `meshloom keys` for every key"


def normalize_override(argument: str) -> str:
    """Rewrite an argument of the command line for Hydra.

    Keys in no schema (another library's, names of the user's own) get Hydra's "++". `optim.name=lamb` becomes `optim=lamb`,
    which chooses the option; the name alone would change nothing.
    """
    if argument.startswith(OPEN_NODES):
        return f"++{argument}"
    return re.sub(rf"^({'|'.join(NAMED)})\.name=", r"\1=", argument)


def quoted(text: str) -> str:
    """Quote a text as the value of an override, so that Hydra reads back exactly that text."""
    return QuotedString(text, Quote.single).with_quotes()


def task_overrides() -> list[str]:
    """Return the overrides of this process's command line; none outside of `hydra.main`."""
    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []


def _delete(config: DictConfig, key: str) -> bool:
    """Delete a key, also one whose value is null. Return whether it was there."""
    parent, _, leaf = key.rpartition(".")
    node: Any = OmegaConf.select(config, parent) if parent else config
    if isinstance(node, DictConfig) and leaf in node:
        with open_dict(node):
            del node[leaf]
        return True
    return False


def _parse(overrides: Sequence[str], loader: ConfigLoader, problems: list[Problem]) -> Iterator[Override]:
    parser = OverridesParser.create(loader)  # the loader resolves a sweep's glob(*)
    for line in overrides:
        try:
            yield from parser.parse_overrides([normalize_override(line)])
        except OverrideParseException:
            fix = "write key=value, and quote what holds spaces, commas or brackets: 'key=\"a, b\"'"
            problems.append(Problem(line, "can't be read", fix))


def _values(override: Override) -> list[str]:
    """Return an override as written, or one override for each value that it sweeps over."""
    if not override.is_discrete_sweep():
        return [override.input_line or ""]
    return [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]


def _keys(config: DictConfig) -> Iterator[str]:
    """Yield every key, groups included."""
    for name, value in config.items_ex(resolve=False):
        yield str(name)
        if isinstance(value, DictConfig) and not value._is_none() and not value._is_missing():
            yield from (f"{name}.{key}" for key in _keys(value))


def drop_unknown(config: DictConfig) -> list[str]:
    """Delete the keys that the schema and its typed groups don't have. Return them."""
    unknown = list(_unknown(config, run_schema()))
    for key in unknown:
        _delete(config, key)
    return unknown


def _unknown(config: DictConfig, kind: type, prefix: str = "") -> Iterator[str]:
    hints = typing.get_type_hints(kind)
    for name, value in config.items_ex(resolve=False):
        if name not in hints:
            yield f"{prefix}{name}"
        elif dataclasses.is_dataclass(hints[name]) and isinstance(value, DictConfig):
            yield from _unknown(value, hints[name], f"{prefix}{name}.")


def reason_of(error: BaseException) -> tuple[str, str]:
    """Return the reason of an error in one line, from its innermost cause without Hydra's framing, and a fix or ''."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if isinstance(error, yaml.MarkedYAMLError):
        return f"bad YAML: {' '.join(lines)}", "correct the file"
    framed = re.match(r"In '(.+)': \w+ raised while composing config:", lines[0])
    if framed and len(lines) > 1:
        key = next((line.removeprefix("full_key: ") for line in lines if line.startswith("full_key: ")), "")
        if key == "recipe" and "DictConfig" in lines[1]:
            what = "its keys were read as those of a group called recipe"
            return what, f"put '# @package _global_' on the first line of {framed[1]}.yaml"
        whole = _in_full(key, lines[1])
        return f"{lines[1]}{f' ({key})' if key else ''}", f"correct recipes file {framed[1]}.yaml{whole and f': {whole}'}"
    return lines[0].rstrip("."), ""
