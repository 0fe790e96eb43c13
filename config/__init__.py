"""Floor 1: the typed form of a run's config. One file per recipe group; `RunConfig` is the whole."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from .checkpoint import CheckpointConfig
from .launch import LaunchConfig
from .logging import LoggingConfig
from .parallel import ParallelConfig
from .problems import ConfigError, Problem
from .trainer import TrainerConfig

__all__ = [
    "CheckpointConfig",
    "ConfigError",
    "LaunchConfig",
    "LoggingConfig",
    "ParallelConfig",
    "Problem",
    "RunConfig",
    "TrainerConfig",
]


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
