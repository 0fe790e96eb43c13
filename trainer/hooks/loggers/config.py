"""Config of `logging`: where a run says how it goes."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import ClassVar

from ....config.keys import Side, key
from ....config.problems import Problem


@dataclass
class LoggingConfig:
    """metrics.jsonl and the progress line are always there; these are more of the same."""

    SIDE: ClassVar[Side] = Side.HABIT

    every: int = key(1, "steps between rows of metrics (evaluations always write theirs)")
    progress: bool = key(True, "show the progress line on rank 0: in place on a terminal, plain lines elsewhere")
    wandb: bool = key(False, "send metrics to Weights & Biases; WANDB_MODE=offline works without a network")
    project: str = key("meshloom", "wandb project")
    tensorboard: bool = key(False, "write TensorBoard events into <output_dir>/tensorboard")


def logging_problems(config: LoggingConfig) -> list[Problem]:
    """Loggers whose library is not installed."""
    return [
        Problem(f"logging.{name}", f"{name} is not installed", f"pip install 'meshloom[{name}]', or logging.{name}=false")
        for name in ("wandb", "tensorboard")
        if getattr(config, name) and importlib.util.find_spec(name) is None
    ]
