"""Config of `schedule`: how the learning rate moves during a run. `optim.lr` is its peak.

Durations are written `200`, `200 steps`, `1.5B tokens`, `4k samples`, `10%` or `0.1` (of the run).
"""

from __future__ import annotations

from dataclasses import dataclass

from hydra.core.config_store import ConfigStore


@dataclass
class ScheduleConfig:
    """Constant after the warm-up; what every schedule has."""

    _target_: str = "meshloom.optim.schedules.schedule.Constant"
    name: str = "constant"
    warmup: int | float | str = "1%"


@dataclass
class CosineConfig(ScheduleConfig):
    """final: ratio of the last learning rate to the peak."""

    _target_: str = "meshloom.optim.schedules.schedule.Cosine"
    name: str = "cosine"
    final: float = 0.1


@dataclass
class LinearConfig(ScheduleConfig):
    """final: ratio of the last learning rate to the peak."""

    _target_: str = "meshloom.optim.schedules.schedule.Linear"
    name: str = "linear"
    final: float = 0.0


@dataclass
class WSDConfig(ScheduleConfig):
    """Warm-up, stable, decay.

    decay        length of the decay, which ends with the run
    decay_form   1-sqrt, linear, cosine, exponential_to_zero, or exponential (with half_life)
    decay_start  where the decay begins; it then lasts to the end of the run, and `decay` is not read
    final        ratio of the last learning rate to the peak
    half_life    of the exponential form; null: such that `final` is reached at the end
    """

    _target_: str = "meshloom.optim.schedules.wsd.WSD"
    name: str = "wsd"
    decay: int | float | str = "20%"
    decay_form: str = "1-sqrt"
    decay_start: int | float | str | None = None
    final: float = 0.0
    half_life: int | float | str | None = None


@dataclass
class PowerConfig(WSDConfig):
    """The power law min(optim.lr, batch · a · tokens^b) in place of WSD's stable phase; batch in sequences of 4,096 tokens."""

    _target_: str = "meshloom.optim.schedules.wsd.Power"
    name: str = "power"
    decay: int | float | str = "10%"
    decay_form: str = "exponential_to_zero"
    a: float = 4.0
    b: float = -0.51


def register(store: ConfigStore) -> None:
    """Make the schemas known to Hydra as schedule/base_<name>; the recipes of the group extend them."""
    for schema in (ScheduleConfig, CosineConfig, LinearConfig, WSDConfig, PowerConfig):
        store.store(group="schedule", name=f"base_{schema.name}", node=schema)
