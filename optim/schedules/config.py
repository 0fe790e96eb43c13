"""Config of `schedule`: the learning rate over a run, whose peak is `optim.lr`.

Durations are written `200`, `200 steps`, `1.5B tokens`, `4k samples`, `10%` or `0.1` (of the run).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from ...config.duration import Duration, Written
from ...config.keys import Side, key, option, target
from ...config.nodes import Custom
from ...config.problems import Problem
from .decay import WINDOWED

FORMS = ("exponential", *WINDOWED)
"""Values of `schedule.decay_form`: "exponential" halves the rate again and again, the others span the decay exactly."""

FINAL = "ratio of the last learning rate to the peak, in [0, 1]"


@dataclass(frozen=True)
class ScheduleConfig:
    """Constant after the warm-up, and the keys of every schedule."""

    SIDE: ClassVar[Side] = Side.RECIPE

    _target_: str = target("meshloom.optim.schedules.schedule.Constant")
    name: str = option("constant")
    warmup: int | float | str = key("1%", "how long the learning rate rises at the start: a duration")

    def problems(self, key: str = "schedule") -> list[Problem]:
        """Return what is wrong with the values. The schedule itself checks them against the run's length."""
        return list(_duration_problems(f"{key}.warmup", self.warmup))


@dataclass(frozen=True)
class CustomSchedule(ScheduleConfig, Custom):
    """A schedule of the user's own."""

    def problems(self, key: str = "schedule") -> list[Problem]:
        """Return nothing: only the user's class knows its keys."""
        return []


def _duration_problems(key: str, written: Written | None) -> Iterator[Problem]:
    if written is None:
        return
    try:
        Duration.parse(written)
    except ValueError as error:
        what, _, fix = str(error).partition("; ")
        yield Problem(key, what, fix)


def _final_problems(key: str, final: float) -> Iterator[Problem]:
    if not 0 <= final <= 1:
        yield Problem(f"{key}.final", f"{final:g} is not a fraction of the peak", "give a number in [0, 1]")


@dataclass(frozen=True)
class CosineConfig(ScheduleConfig):
    """Half a cosine wave down to the end of the run."""

    _target_: str = target("meshloom.optim.schedules.schedule.Cosine")
    name: str = option("cosine")
    final: float = key(0.1, FINAL)

    def problems(self, key: str = "schedule") -> list[Problem]:
        """Return what is wrong with the values."""
        return [*super().problems(key), *_final_problems(key, self.final)]


@dataclass(frozen=True)
class LinearConfig(ScheduleConfig):
    """A straight line down to the end of the run."""

    _target_: str = target("meshloom.optim.schedules.schedule.Linear")
    name: str = option("linear")
    final: float = key(0.0, FINAL)

    def problems(self, key: str = "schedule") -> list[Problem]:
        """Return what is wrong with the values."""
        return [*super().problems(key), *_final_problems(key, self.final)]


@dataclass(frozen=True)
class WSDConfig(ScheduleConfig):
    """Warm-up, stable, decay."""

    _target_: str = target("meshloom.optim.schedules.wsd.WSD")
    name: str = option("wsd")
    decay: int | float | str = key("20%", "length of the decay, which ends with the run: a duration")
    decay_form: str = key("1-sqrt", "1-sqrt, linear, cosine, exponential_to_zero, or exponential (with half_life)")
    decay_start: int | float | str | None = key(
        None, "where the decay begins: a duration; it then lasts to the end of the run, and `decay` is not read"
    )
    final: float = key(0.0, FINAL)
    half_life: int | float | str | None = key(
        None, "of the exponential form: a duration; null: such that `final` is reached at the end"
    )

    def problems(self, key: str = "schedule") -> list[Problem]:
        """Return what is wrong with the values."""
        found = [*super().problems(key), *_final_problems(key, self.final)]
        for name in ("decay", "decay_start", "half_life"):
            found += _duration_problems(f"{key}.{name}", getattr(self, name))
        if self.decay_form not in FORMS:
            found.append(Problem(f"{key}.decay_form", f"'{self.decay_form}' is unknown", f"choose one of {', '.join(FORMS)}"))
        elif self.decay_form != "exponential" and self.half_life is not None:
            fix = f"leave it out, or set {key}.decay_form=exponential"
            found.append(Problem(f"{key}.half_life", f"decay_form {self.decay_form} has no half-life", fix))
        elif self.decay_form == "exponential" and self.half_life is None and self.final <= 0:
            fix = f"set {key}.half_life, or {key}.final to a ratio above 0, or {key}.decay_form=exponential_to_zero"
            what = "an exponential decay never reaches 0, so its half-life must be given"
            found.append(Problem(f"{key}.half_life", what, fix))
        return found


@dataclass(frozen=True)
class PowerConfig(WSDConfig):
    """The power law min(optim.lr, batch · a · tokens^b) in place of WSD's stable phase; batch in sequences of 4,096 tokens."""

    _target_: str = target("meshloom.optim.schedules.wsd.Power")
    name: str = option("power")
    decay: int | float | str = key("10%", "length of the decay, which ends with the run: a duration")
    decay_form: str = key("exponential_to_zero", "1-sqrt, linear, cosine, exponential_to_zero, or exponential (with half_life)")
    a: float = key(4.0, "factor of the power law")
    b: float = key(-0.51, "exponent of the power law")

    def problems(self, key: str = "schedule") -> list[Problem]:
        """Return what is wrong with the values."""
        found = super().problems(key)
        if not 0 < self.a < math.inf:
            found.append(
                Problem(f"{key}.a", f"{self.a:g} makes no learning rate", "use a number above 0; the paper's setting is 4")
            )
        if not -math.inf < self.b <= 0:
            found.append(
                Problem(f"{key}.b", f"{self.b:g} does not let the rate fall", "use 0 or less; the paper's setting is -0.51")
            )
        return found


OPTIONS: tuple[type, ...] = (ScheduleConfig, CosineConfig, LinearConfig, WSDConfig, PowerConfig)
"""Schemas of the group, known to Hydra as schedule/base_<name>; the recipes of the group extend them."""
