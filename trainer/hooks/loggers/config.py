"""Config of `logging`: where a run says how it goes."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

from ....config.problems import Problem


@dataclass
class LoggingConfig:
    """metrics.jsonl and the progress line are always there; these are more of the same.

    every        steps between rows of metrics (evaluations always write theirs)
    progress     show the progress line on rank 0: in place on a terminal, plain lines elsewhere
    wandb        send metrics to Weights & Biases; WANDB_MODE=offline works without a network
    project      wandb project
    tensorboard  write TensorBoard events into <output_dir>/tensorboard
    """

    every: int = 1
    progress: bool = True
    wandb: bool = False
    project: str = "meshloom"
    tensorboard: bool = False


def logging_problems(config: LoggingConfig) -> list[Problem]:
    """Loggers whose library is not installed."""
    return [
        Problem(f"logging.{name}", f"{name} is not installed", f"pip install 'meshloom[{name}]', or logging.{name}=false")
        for name in ("wandb", "tensorboard")
        if getattr(config, name) and importlib.util.find_spec(name) is None
    ]
