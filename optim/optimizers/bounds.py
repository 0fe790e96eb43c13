"""Bounds of an optimizer's numbers. Others are refused, with their key, before a run starts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ...config.problems import Problem


@dataclass(frozen=True)
class Bound:
    """A set of numbers: in words for the message, and as a test that only such a number passes (no NaN)."""

    words: str
    holds: Callable[[float], bool]


POSITIVE = Bound("a number above 0", lambda x: 0 < x < math.inf)
NOT_NEGATIVE = Bound("0 or more", lambda x: 0 <= x < math.inf)
FRACTION = Bound("a number in [0, 1)", lambda x: 0 <= x < 1)
COUNT = Bound("1 or more", lambda x: x >= 1)


def bound_problems(key: str, bound: Bound, **settings: float) -> list[Problem]:
    """Return a problem for each setting of the group `key` that is not within the bound."""
    return [
        Problem(f"{key}.{name}", f"{value:g} can't be used", f"use {bound.words}")
        for name, value in settings.items()
        if not bound.holds(value)
    ]


def beta_problems(key: str, betas: Sequence[float], name: str = "betas") -> list[Problem]:
    """Return what is wrong with the weights of the past in Adam's two moments. name: of their key."""
    if len(betas) != 2:
        return [Problem(f"{key}.{name}", f"{list(betas)} are not two numbers", "give two, such as [0.9, 0.95]")]
    return [problem for beta in betas for problem in bound_problems(key, FRACTION, **{name: beta})]


def choice_problems(key: str, name: str, value: str, choices: Sequence[str]) -> list[Problem]:
    """Return a problem if the setting of the group `key` is none of the choices."""
    if value in choices:
        return []
    return [Problem(f"{key}.{name}", f"'{value}' is unknown", f"choose one of {', '.join(choices)}")]
