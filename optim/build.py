"""Build the objects that configs describe: Meshloom's classes take the config, a user's own class the keys of its node.

The keys of the trainer are not passed to a user's own class: `name`, and of `optim` `lr_coupling` and `local`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..config.nodes import build
from .batch.config import BatchConfig
from .batch.controller import Controller
from .horizon import Horizon
from .optimizers.config import OptimConfig
from .schedules.config import ScheduleConfig
from .schedules.schedule import Schedule

if TYPE_CHECKING:
    import torch

    from .optimizers.parameters import NamedParameter, Shards


def build_schedule(config: ScheduleConfig, peak: float | str, horizon: Horizon) -> Schedule:
    """Build the schedule. peak: the number that a law, if any, has given. Check its `problems()` before using it."""
    return build(config, leave_out=("name",), peak=peak, horizon=horizon)


def build_optimizer(config: OptimConfig, parameters: Sequence[NamedParameter], shards: Shards) -> torch.optim.Optimizer:
    """Build the optimizer over this rank's shards."""
    return build(config, leave_out=("name", "lr_coupling", "local"), parameters=parameters, shards=shards)


def build_controller(config: BatchConfig, horizon: Horizon) -> Controller:
    """Build the batch-size controller. Check its `problems()` first."""
    return build(config, leave_out=("name",), horizon=horizon)
