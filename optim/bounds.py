"""Which numbers an optimizer can use; others are refused with their key when it is built, and so before a run starts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ..config.problems import ConfigError, Problem


@dataclass(frozen=True)
class Bound:
    """Numbers, in words for whoever is to choose another, and as a test that nothing but such a number passes (no NaN)."""

    words: str
    holds: Callable[[float], bool]


POSITIVE = Bound("a number above 0", lambda x: 0 < x < math.inf)
NOT_NEGATIVE = Bound("0 or more", lambda x: 0 <= x < math.inf)
FRACTION = Bound("a number in [0, 1)", lambda x: 0 <= x < 1)
COUNT = Bound("1 or more", lambda x: x >= 1)


def outside(bound: Bound, **settings: float) -> list[Problem]:
    """The keys of `optim` whose numbers are not within the bound."""
    return [
        Problem(f"optim.{key}", f"{value:g} can't be used", f"use {bound.words}")
        for key, value in settings.items()
        if not bound.holds(value)
    ]


def refuse(problems: Iterable[Problem]) -> None:
    """Raise ConfigError if there are any."""
    found = list(problems)
    if found:
        raise ConfigError(found)
