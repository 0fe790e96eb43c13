"""Keys of the config: how a dataclass declares them, and how to list them.

A key has a side, which says where a resumed run takes it from.

recipe     what is computed: from the checkpoint
placement  where and how: from today's command line and recipe files, never from the checkpoint; but a path of data that they
           leave open is the checkpoint's
habit      how the run saves and reports: from the checkpoint, unless typed
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from .duration import Unit

MISSING: Any = "???"
"""Default of a key that must be given, as in omegaconf."""


class Side(Enum):
    """Side of a key: see the module."""

    RECIPE = "recipe"
    PLACEMENT = "placement"
    HABIT = "habit"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class RecipeWhen:
    """Side of a key that is placement, but recipe under choices that make the computed numbers depend on it.

    when   these choices, in words
    holds  typed config of a run → whether it makes one of them
    """

    when: str
    holds: Callable[[Any], bool]

    def of(self, run: Any) -> Side:
        """Return the side under the choices of a run."""
        return Side.RECIPE if self.holds(run) else Side.PLACEMENT

    def __str__(self) -> str:
        return f"placement; recipe under {self.when}"


def key(default: Any, meaning: str, side: Side | RecipeWhen | None = None, unit: Unit | None = None) -> Any:
    """Declare a field of a config dataclass.

    side: None takes the class's `SIDE`; unit: of a whole number, which may then be typed as 1.5B (`parse_count`)
    """
    return _field(default, {"meaning": meaning, "side": side, "unit": unit})


def not_a_key(default: Any) -> Any:
    """Declare a field of a config dataclass that nobody can set by its name."""
    return _field(default, {"key": False})


def _field(default: Any, metadata: dict[str, Any]) -> Any:
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: copy.copy(typing.cast(Any, default)), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def target(path: str) -> Any:
    """Declare `_target_`, the path of the class that a node is built from."""
    return key(path, "the class that is built; one of your own takes the node's keys")


def option(name: str) -> Any:
    """Declare `name`, which tells the options of a group apart."""
    return key(name, "the option's name; choose another as <group>=<name>")


@dataclass(frozen=True)
class Key:
    """One declared key. default: MISSING where it must be given."""

    name: str
    type: str
    default: Any
    side: Side | RecipeWhen
    meaning: str


@functools.cache
def hints_of(kind: type) -> Mapping[str, Any]:
    """Return the types that a class declares, by name, with what they refer to: each look evaluates their text."""
    return typing.get_type_hints(kind)


def keys_of(kind: type, only: Collection[str] | None = None) -> Iterator[Key]:
    """Yield the keys that a config dataclass declares; keys of nested dataclasses have dotted names.

    only: names of the fields to list. Raises TypeError for a field without a meaning or a side.
    """
    hints = hints_of(kind)
    for field in dataclasses.fields(kind):
        if (only is not None and field.name not in only) or not field.metadata.get("key", True):
            continue
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            inner = keys_of(typing.cast(type, hint))
            yield from (dataclasses.replace(found, name=f"{field.name}.{found.name}") for found in inner)
            continue
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        side = field.metadata.get("side") or getattr(kind, "SIDE", None)
        if side is None or not field.metadata.get("meaning"):
            raise TypeError(f"{kind.__name__}.{field.name}: declare it with key(default, meaning), and a side")
        yield Key(field.name, type_name(hint), default, side, field.metadata["meaning"])


def field_of(kind: type, key: str) -> dataclasses.Field[Any] | None:
    """Return the field that declares a key of a config dataclass; None where there is none. Nested keys have dotted names."""
    name, _, inner = key.partition(".")
    found = next((one for one in dataclasses.fields(kind) if one.name == name), None)
    if found is None or not inner:
        return found
    hint = hints_of(kind)[name]
    return field_of(hint, inner) if dataclasses.is_dataclass(hint) and isinstance(hint, type) else None


def type_name(hint: Any) -> str:
    """Return a type as it is written in the code."""
    if isinstance(hint, types.UnionType):
        return " | ".join(type_name(member) for member in typing.get_args(hint))
    if hint is types.NoneType:
        return "null"
    if typing.get_args(hint):
        return str(hint).replace("typing.", "")
    return "any" if hint is Any else hint.__name__
