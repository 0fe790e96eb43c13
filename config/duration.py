"""Duration: a length of training in steps, tokens, samples, or as a fraction of the whole run."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from enum import Enum
from fractions import Fraction


class Unit(Enum):
    """Unit of a duration."""

    STEPS = "steps"
    TOKENS = "tokens"
    SAMPLES = "samples"
    FRACTION = "fraction"


Written = str | int | float
"""A duration as a user writes it: see `Duration`."""

_SCALE = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
_PATTERN = re.compile(r"^\s*([0-9][0-9_]*\.?[0-9]*(?:e[+-]?[0-9]+)?)\s*([kmbt]?)\s*(steps?|tokens?|samples?|%)?\s*$", re.I)


def parse_count(written: str | int | float, unit: Unit) -> int:
    """Read a whole number of steps, tokens or samples: 1000000000, 1_000M, 1.5B, 1e9, '1.5B tokens'.

    Raises ValueError for anything else, another unit included.
    """
    match = _PATTERN.match(str(written))
    word = (match[3] or "").lower().rstrip("s") if match else ""
    value = Fraction(match[1].replace("_", "")) * _SCALE[match[2].lower()] if match else None
    if value is None or value.denominator != 1 or word not in ("", unit.value.rstrip("s")):
        raise ValueError(f"'{written}' is no number of {unit.value}")
    return int(value)


@dataclass(frozen=True)
class Duration:
    """A length of training. Written `200`, `200 steps`, `1.5B tokens`, `4k samples`, `10%` or `0.1` (of the run)."""

    value: float
    unit: Unit

    @classmethod
    def parse(cls, written: str | int | float | Duration) -> Duration:
        """Read a duration as a user writes it. A whole number is steps; a number in (0, 1) is a fraction of the run.

        A decimal number from 1 to 100 is refused: beside 0.9 for 90 %, nobody can tell whether 1.0 is a step, all or 1 %.

        Raises ValueError saying what forms are understood.
        """
        if isinstance(written, Duration):
            return written
        match = _PATTERN.match(str(written))
        if not match:
            raise ValueError(f"'{written}' is not a duration; write 200, '200 steps', '1.5B tokens', '4k samples' or '10%'")
        number, scale, word = match.groups()
        value = float(number.replace("_", "")) * _SCALE[scale.lower()]
        if math.isinf(value):
            raise ValueError(f"'{written}' is more than any run; write a number below 1e300")
        word = (word or "").lower().rstrip("s")
        if word == "%":
            value, unit = value / 100, Unit.FRACTION
        elif word:
            unit = {"step": Unit.STEPS, "token": Unit.TOKENS, "sample": Unit.SAMPLES}[word]
        elif 0 < value < 1:
            unit = Unit.FRACTION
        else:
            unit = Unit.STEPS
        if unit is Unit.FRACTION and value > 1:
            raise ValueError(f"'{written}' is more than the whole run; write at most 100%")
        if not word and not scale and "." in number and 1 <= value <= 100:
            whole = f"{value:g}" if value == int(value) else f"{round(value)}"
            share = "100%" if value == 1 else f"{value:g}%"
            raise ValueError(f"'{written}' may be steps or a share; write {whole} for steps, or '{share}' of the run")
        if unit is Unit.STEPS and value != int(value):
            raise ValueError(f"'{written}' is not a whole number of steps; write steps as an integer or a fraction as '10%'")
        return cls(value, unit)

    def __str__(self) -> str:
        if self.unit is Unit.FRACTION:
            return f"{self.value * 100:g}%"
        return f"{self.value:.15g} {self.unit.value if self.value != 1 else self.unit.value.removesuffix('s')}"
