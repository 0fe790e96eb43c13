"""Convert a composed config to its dataclasses, and back to plain containers."""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..config.keys import MISSING, hints_of
from ..config.nodes import Custom, find_option
from ..config.problems import ConfigError, Problem
from ..config.renames import with_moved_targets
from ..config.structured import literal, structured, with_text_keys
from ..data.config import CustomData
from ..models.config import CustomModel
from ..optim.batch.config import CustomBatch
from ..optim.optimizers.config import CustomOptim
from ..optim.schedules.config import CustomSchedule
from .schema import OPTIONS, RunConfig

CUSTOM: dict[str, type] = {
    "model": CustomModel,
    "data": CustomData,
    "optim": CustomOptim,
    "schedule": CustomSchedule,
    "batch": CustomBatch,
}
"""Group → the dataclass of a node whose class is the user's own."""


def option_of(group: str, node: Any) -> type | None:
    """Return the dataclass of a node of the group; None if the class is the user's own."""
    return find_option(OPTIONS[group], node.get("_target_"))


def typed_config(config: DictConfig) -> tuple[RunConfig, list[Problem]]:
    """Return the config as dataclasses, and a problem for every key that is not set or whose value has another type.

    A group with options that has such a problem is None (`RunConfig.unusable`), and is not checked further.
    """
    problems = [
        Problem(key, "is not set", f"give it as {key}=…")
        for key in sorted(_missing_keys(OmegaConf.to_container(config, resolve=False)))
    ]
    values: dict[str, Any] = {}
    for name, hint in hints_of(RunConfig).items():
        if name not in {field.name for field in dataclasses.fields(RunConfig)}:
            continue
        value = _plain(config, name, problems)
        if name in OPTIONS:
            values[name] = None
            if value is _UNRESOLVED:
                continue
            value = with_moved_targets(value)
            if isinstance(value, dict) and not any(problem.key.startswith(f"{name}.") for problem in problems):
                values[name] = _typed_node(name, value, problems)
            elif not any(problem.key == name or problem.key.startswith(f"{name}.") for problem in problems):
                problems.append(Problem(name, f"{value!r} names no class", f"choose one: {name}=…"))
        else:
            values[name] = _typed(hint, value) if dataclasses.is_dataclass(hint) else value
    return RunConfig(**values), problems


_UNRESOLVED = object()


def _missing_keys(tree: Any, prefix: str = "") -> Iterator[str]:
    """Yield the keys without a value. References are not followed: OmegaConf's `missing_keys` fails where one has no value."""
    if isinstance(tree, dict):
        for name, value in typing.cast(dict[str, Any], tree).items():
            yield from _missing_keys(value, f"{prefix}.{name}" if prefix else name)
    elif isinstance(tree, list):
        for number, value in enumerate(typing.cast(list[Any], tree)):
            yield from _missing_keys(value, f"{prefix}[{number}]")
    elif tree == MISSING:
        yield prefix


def _plain(config: DictConfig, name: str, problems: list[Problem]) -> Any:
    """Return one key of the whole config in plain containers.

    If it refers to a missing key, there is a problem; a group with options is then _UNRESOLVED.
    """
    if OmegaConf.is_missing(config, name):
        return None
    try:
        node = config[name]
        return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    except OmegaConfBaseException as error:
        known = {problem.key for problem in problems}
        if not any(key in str(error) for key in known):
            problems.append(Problem(name, str(error).splitlines()[0], "refer to a key that is set"))
        if name in OPTIONS:
            return _UNRESOLVED
        node = OmegaConf.to_container(config, resolve=False)
        return typing.cast(Any, node)[name]


def _typed(kind: Any, values: Any) -> Any:
    """Return plain values, which Hydra has checked, as their dataclass."""
    hints = hints_of(kind)
    known = {field.name for field in dataclasses.fields(kind)}
    return kind(
        **{
            name: _typed(hints[name], value) if dataclasses.is_dataclass(hints[name]) and isinstance(value, dict) else value
            for name, value in values.items()
            if name in known and value != MISSING
        }
    )


def typed_node(group: str, node: dict[str, Any]) -> Any:
    """Return a node of a group as a dataclass. Raises ConfigError where its values have other types."""
    problems: list[Problem] = []
    found = _typed_node(group, node, problems)
    if problems:
        raise ConfigError(problems)
    return found


@functools.cache
def _schema(kind: type) -> DictConfig:
    """Return the schema of a dataclass, for merges, which leave it as it is."""
    return structured(kind)


def _typed_node(group: str, node: dict[str, Any], problems: list[Problem]) -> Any:
    """Return a node as its option's dataclass, or the group's for a user's class; None, with a problem, for wrong types.

    node: resolved, so that `${…}` in it is text, which the environment must not fill in
    """
    kind = option_of(group, node)
    custom = kind is None
    kind = kind or CUSTOM[group]
    known = {field.name for field in dataclasses.fields(kind) if field.metadata.get("key", True)}
    try:
        merged = OmegaConf.merge(_schema(kind), literal({k: v for k, v in node.items() if k in known}))
        values = {k: v for k, v in typing.cast(Any, OmegaConf.to_container(merged, resolve=True)).items() if k in known}
    except OmegaConfBaseException as error:
        lines = [line.strip() for line in str(error).splitlines()]
        key = next((line.removeprefix("full_key: ") for line in lines if line.startswith("full_key: ")), "")
        problems.append(Problem(f"{group}.{key}" if key else group, lines[0], "give a value of its type"))
        return None
    if custom:
        keys = {key: value for key, value in node.items() if key != "_target_"}
        return dataclasses.replace(_typed(kind, values), path=str(node.get("_target_")), keys=keys)
    return _typed(kind, values)


def replace_keys(config: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """Return a config with other values, by key as written on the command line."""
    for key, value in values.items():
        group, _, name = key.partition(".")
        node = vars(config)[group]
        changes: dict[str, Any] = {name: value}
        if isinstance(node, Custom):  # its class is given the keys of the node
            changes["keys"] = {**node.keys, name: value}
        config = dataclasses.replace(config, **{group: dataclasses.replace(node, **changes)})
    return config


def value_of(config: RunConfig, key: str) -> Any:
    """Return the value of a key of a group, as written on the command line."""
    group, _, name = key.partition(".")
    return vars(vars(config)[group])[name]


def plain_config(config: RunConfig) -> dict[str, Any]:
    """Return the config as plain containers, as it is saved and shown."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = vars(config)[field.name]
        if isinstance(value, Custom):
            found[field.name] = {"_target_": value.path, **value.keys}
        elif dataclasses.is_dataclass(value):
            found[field.name] = with_text_keys(type(value), dataclasses.asdict(typing.cast(Any, value)))
        else:
            found[field.name] = value
    return found
