"""Parse the arguments of small subcommands: `key=value`, typed by a dataclass, with all problems at once."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Sequence
from typing import Any, TypeVar

from ..config.problems import ConfigError, Problem

T = TypeVar("T")


def parse(kind: type[T], argv: Sequence[str]) -> T:
    """Build a dataclass from `key=value` words. A value is taken literally, spaces and brackets included.

    Fields are str, int, float, bool, or one of these or None (written `null`); a field of tuple[str, ...] has a value of every
    word. Raises ConfigError with all problems.
    """
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(typing.cast(Any, kind))}
    values: dict[str, Any] = {}
    problems: list[Problem] = []
    for word in argv:
        key, equals, written = word.partition("=")
        if not equals:
            problems.append(Problem(word, "is not key=value", f"the keys are {', '.join(fields)}"))
        elif key not in fields:
            near = difflib.get_close_matches(key, fields, 1)
            fix = f"did you mean {near[0]}?" if near else f"the keys are {', '.join(fields)}"
            problems.append(Problem(key, "there is no such key", fix))
        else:
            try:
                is_list = typing.get_origin(hints[key]) is tuple
                values[key] = (*values.get(key, ()), written) if is_list else _read(written, hints[key])
            except ValueError:
                problems.append(Problem(key, f"'{written}' is not {_name(hints[key])}", f"write {key}={_name(hints[key])}"))
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in values and not any(problem.key == name for problem in problems):
            problems.append(Problem(name, "is not given", f"write {name}=…"))
    if problems:
        raise ConfigError(problems)
    return kind(**values)


def _read(written: str, hint: Any) -> Any:
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if type(None) in kinds:
        if written.lower() in ("null", "none"):
            return None
        kinds = [kind for kind in kinds if kind is not type(None)]
    kind = kinds[0]
    if kind is bool:
        if written.lower() not in ("true", "false"):
            raise ValueError(written)
        return written.lower() == "true"
    return kind(written)


def _name(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    if typing.get_origin(hint) is tuple:
        return "text, may be given several times"
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return " or ".join(names[kind] for kind in kinds)


def describe(kind: type) -> str:
    """Return the keys with their defaults, one line each, for a subcommand's --help."""
    hints = typing.get_type_hints(kind)
    lines: list[str] = []
    for field in dataclasses.fields(typing.cast(Any, kind)):
        default = "" if field.default is dataclasses.MISSING else f" (default {field.default!r})"
        lines.append(f"  {field.name}=<{_name(hints[field.name])}>{default}")
    return "\n".join(lines)
