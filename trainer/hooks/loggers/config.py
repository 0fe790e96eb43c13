"""Config of `logging`: where metrics are written."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import ClassVar

from ....config.keys import Side, key
from ....config.problems import Problem


@dataclass(frozen=True)
class LoggingConfig:
    """Interval of rows, and loggers besides metrics.jsonl, which is always written."""

    SIDE: ClassVar[Side] = Side.HABIT

    every: int = key(1, "steps between rows of metrics (the first and last step, and evaluations, always have theirs)")
    progress: bool = key(True, "show the progress line on rank 0: in place on a terminal, plain lines elsewhere")
    wandb: bool = key(False, "send metrics to Weights & Biases; WANDB_MODE=offline works without a network")
    project: str | None = key(None, "wandb project; null: that of WANDB_PROJECT, or else meshloom")
    tensorboard: bool = key(False, "write TensorBoard events into <output_dir>/tensorboard")

    def problems(self, key: str = "logging") -> list[Problem]:
        """Return the problems of the values, and of loggers whose library is not installed."""
        found = [
            Problem(f"{key}.{name}", f"{name} is not installed", f"pip install 'meshloom[{name}]', or {key}.{name}=false")
            for name in ("wandb", "tensorboard")
            if getattr(self, name) and importlib.util.find_spec(name) is None
        ]
        if self.every < 1:
            found.append(Problem(f"{key}.every", f"{self.every} is not a number of steps", "use 1 for a row every step"))
        return found
