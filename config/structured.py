"""Schemas for OmegaConf, made of config dataclasses, values that it leaves as they are, and values that JSON can hold."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf


def structured(kind: type, **flags: bool) -> DictConfig:
    """Return the schema of a config dataclass, into which values can be merged.

    A config dataclass is frozen, for which OmegaConf makes its nodes read-only: here they are not. flags: of the schema.
    """
    schema = cast(DictConfig, OmegaConf.structured(kind, flags=dict(flags)))
    _make_writable(schema)
    return schema


def _make_writable(node: DictConfig) -> None:
    OmegaConf.set_readonly(node, None)
    inner: list[Any] = [value for _, value in node.items_ex(resolve=False)]
    for value in inner:
        if isinstance(value, DictConfig) and not value._is_missing() and not value._is_none():
            _make_writable(value)


def literal(tree: Any) -> Any:
    """Return plain containers in which no text is an interpolation: `${…}` of a checkpoint stays text."""
    if isinstance(tree, dict):
        return {key: literal(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [literal(value) for value in tree]
    return re.sub(r"(\\*)\$\{", lambda found: f"{found[1] * 2}\\${{", tree) if isinstance(tree, str) else tree


def with_text_keys(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return plain values of a config dataclass with all keys of mappings as text, since JSON has no others.

    Raises TypeError for a field whose keys are neither text nor whole numbers.
    """
    return _with_keys(kind, values, lambda _, key: str(key))


def with_declared_keys(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return plain values with the keys of mappings in the types that their fields declare: undo `with_text_keys`."""
    return _with_keys(kind, values, lambda declared, key: declared(key))


def _with_keys(kind: type, values: Mapping[str, Any], convert: Callable[[type, Any], Any]) -> dict[str, Any]:
    """Convert the keys of every mapping that a field of the dataclass, or of one nested in it, declares."""
    hints = typing.get_type_hints(kind)
    found = dict(values)
    for name, value in values.items():
        declared = _without_null(hints.get(name))
        if not isinstance(value, Mapping):
            continue
        inner = cast(Mapping[Any, Any], value)
        if dataclasses.is_dataclass(declared):
            found[name] = _with_keys(cast(type, declared), inner, convert)
        elif typing.get_origin(declared) is dict and (of := typing.get_args(declared)[0]) is not str:
            if of is not int:
                raise TypeError(f"{kind.__name__}.{name}: keys of {of.__name__} can't be saved; declare text or whole numbers")
            found[name] = {convert(of, key): each for key, each in inner.items()}
    return found


def _without_null(hint: Any) -> Any:
    """Return the type of a field's values that are not null, where it is one."""
    members = [each for each in typing.get_args(hint) if each is not types.NoneType]
    return members[0] if isinstance(hint, types.UnionType) and len(members) == 1 else hint
