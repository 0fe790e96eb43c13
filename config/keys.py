"""Keys of the config: how a dataclass declares one, and what can be read off the declaration.

A key has a side. *Recipe*: what is computed; a resumed run takes it from its checkpoint. *Placement*: where and how; it is
today's, never the checkpoint's. *Habit*: how the run saves and reports; kept from the checkpoint until somebody types another.
"""

from __future__ import annotations

import copy
import dataclasses
import types
import typing
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

MISSING: Any = "???"
"""Default of a key that must be given; omegaconf reads it so."""


class Side(Enum):
    """What a key is about: see the module."""

    RECIPE = "recipe"
    PLACEMENT = "placement"
    HABIT = "habit"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class RecipeWhen:
    """The side of a key that is placement, except under choices that make what is computed depend on it.

    when   these choices, in words
    holds  whether a run (its typed config) has made one of them
    """

    when: str
    holds: Callable[[Any], bool]

    def of(self, run: Any) -> Side:
        """The side under the choices of a run."""
        return Side.RECIPE if self.holds(run) else Side.PLACEMENT

    def __str__(self) -> str:
        return f"placement; recipe under {self.when}"


def key(default: Any, meaning: str, side: Side | RecipeWhen | None = None) -> Any:
    """Declare a field of a config dataclass. side: None takes the class's `SIDE`."""
    metadata = {"meaning": meaning, "side": side}
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: copy.copy(typing.cast(Any, default)), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def target(path: str) -> Any:
    """Declare `_target_`, the class that a node is built from."""
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


def keys_of(kind: type, only: Collection[str] | None = None) -> Iterator[Key]:
    """The keys that a config dataclass declares; those of dataclasses in it have dotted names.

    only: of these fields. Raises TypeError for one without a meaning or a side.
    """
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if only is not None and field.name not in only:
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


def type_name(hint: Any) -> str:
    """A type as it is written in the code."""
    if isinstance(hint, types.UnionType):
        return " | ".join(type_name(member) for member in typing.get_args(hint))
    if hint is types.NoneType:
        return "null"
    if typing.get_args(hint):
        return str(hint).replace("typing.", "")
    return "any" if hint is Any else hint.__name__
