"""key=value arguments of the benchmarks whose settings are a dataclass."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar

S = TypeVar("S")


def read(settings: S, arguments: Sequence[str]) -> S:
    """Put the arguments into the settings, a dataclass with a default for every field, whose type says how a value is read.

    Ends the program for a key that it does not have.
    """
    there: Any = settings
    fields = [field.name for field in dataclasses.fields(there)]
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key not in fields:
            raise SystemExit(f"there is no '{key}'; arguments are {', '.join(fields)}")
        setattr(settings, key, type(getattr(settings, key))(value))
    return settings
