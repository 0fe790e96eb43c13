"""Config of `schedule`: how the learning rate moves during a run. `optim.lr` is its peak.

Durations are written `200`, `200 steps`, `1.5B tokens`, `4k samples`, `10%` or `0.1` (of the run).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...config.keys import Side, key, option, target

FINAL = "ratio of the last learning rate to the peak, in [0, 1]"


@dataclass
class ScheduleConfig:
    """Constant after the warm-up; what every schedule has."""

    SIDE: ClassVar[Side] = Side.RECIPE

    _target_: str = target("meshloom.optim.schedules.schedule.Constant")
    name: str = option("constant")
    warmup: int | float | str = key("1%", "how long the learning rate rises at the start: a duration")


@dataclass
class CosineConfig(ScheduleConfig):
    """Half a cosine wave down to the end of the run."""

    _target_: str = target("meshloom.optim.schedules.schedule.Cosine")
    name: str = option("cosine")
    final: float = key(0.1, FINAL)


@dataclass
class LinearConfig(ScheduleConfig):
    """A straight line down to the end of the run."""

    _target_: str = target("meshloom.optim.schedules.schedule.Linear")
    name: str = option("linear")
    final: float = key(0.0, FINAL)


@dataclass
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


@dataclass
class PowerConfig(WSDConfig):
    """The power law min(optim.lr, batch · a · tokens^b) in place of WSD's stable phase; batch in sequences of 4,096 tokens."""

    _target_: str = target("meshloom.optim.schedules.wsd.Power")
    name: str = option("power")
    decay: int | float | str = key("10%", "length of the decay, which ends with the run: a duration")
    decay_form: str = key("exponential_to_zero", "1-sqrt, linear, cosine, exponential_to_zero, or exponential (with half_life)")
    a: float = key(4.0, "factor of the power law")
    b: float = key(-0.51, "exponent of the power law")


OPTIONS: tuple[type, ...] = (ScheduleConfig, CosineConfig, LinearConfig, WSDConfig, PowerConfig)
"""Schemas of the group, known to Hydra as schedule/base_<name>; the recipes of the group extend them."""
