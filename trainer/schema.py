"""The whole config of a run, typed, and its registration with Hydra. A group's dataclass stands beside what it configures."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from ..checkpoint.config import CheckpointConfig
from ..config.compose import SCHEMA, Composer
from ..data import config as data
from ..models import config as models
from ..optim.batch import config as batch
from ..optim.optimizers import config as optimizers
from ..optim.schedules import config as schedules
from ..parallel.config import ParallelConfig
from .config import TrainerConfig
from .hooks.loggers.config import LoggingConfig
from .launching import LaunchConfig


@dataclass
class RunConfig:
    """Everything a run is a function of. Groups of type Any may be replaced by a user's own class (`_target_`).

    resume  none; auto: go on from the newest complete checkpoint of the run, if there is one; the path of any checkpoint;
            auto:<path>: as auto, and where the run has saved nothing yet, from that path
    """

    recipe: str = MISSING
    output_dir: str = "outputs/${recipe}"
    seed: int = 1
    precision: str = "bf16"
    resume: str = "none"
    model: Any = MISSING
    data: Any = MISSING
    optim: Any = MISSING
    schedule: Any = MISSING
    batch: Any = MISSING
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)


def register_schemas() -> None:
    """Make the typed form of every recipe group known to Hydra."""
    store = ConfigStore.instance()
    store.store(name=SCHEMA, node=RunConfig)
    for group in (models, data, optimizers, schedules, batch):
        group.register(store)


def make_composer(config_dir: str | None = None) -> Composer:
    """A composer of configs of this schema. Raises ConfigError where `config_dir` does not exist."""
    register_schemas()
    return Composer(config_dir)
