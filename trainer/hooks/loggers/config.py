"""Config of `logging`: where metrics are written."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any, ClassVar

from ....config.keys import Side, key
from ....config.problems import Problem

LONGEST_TAG = 64
"""Characters that Weights & Biases takes in a tag."""


@dataclass(frozen=True)
class LoggingConfig:
    """Interval of rows, and loggers besides metrics.jsonl, which is always written."""

    SIDE: ClassVar[Side] = Side.HABIT

    every: int = key(1, "steps between rows of metrics (the first and last step, and evaluations, always have theirs)")
    progress: bool = key(
        True,
        "say that processes are started, and show the progress line on rank 0: in place on a terminal, plain lines elsewhere",
    )
    wandb: bool = key(False, "send metrics to Weights & Biases; WANDB_MODE=offline works without a network")
    project: str | None = key(None, "wandb project; null: that of WANDB_PROJECT, or else meshloom")
    entity: str | None = key(None, "team or user of the wandb run; null: that of WANDB_ENTITY, or else your own")
    name: str | None = key(None, "name of the wandb run; null: WANDB_NAME, or else the recipe, with what a sweep varies")
    group: str | None = key(None, "group of the wandb run; null: WANDB_RUN_GROUP, or else that of the sweep")
    tags: list[Any] = key([], "tags of the wandb run")
    tensorboard: bool = key(False, "write TensorBoard events into <output_dir>/tensorboard")

    def problems(self, key: str = "logging") -> list[Problem]:
        """Return the problems of the values, and of loggers whose library is not installed."""
        found = [
            Problem(
                f"{key}.{name}",
                f"{name} is not installed",
                f"pip install 'meshloom[{name}]', or {key}.{name}=false",
                lacks=name,
            )
            for name in ("wandb", "tensorboard")
            if getattr(self, name) and importlib.util.find_spec(name) is None
        ]
        for name in ("project", "entity", "name", "group"):
            value = getattr(self, name)
            if value is not None and not value.strip():
                found.append(Problem(f"{key}.{name}", "is empty", "write one, or null"))
        if not all(isinstance(tag, str) and 0 < len(tag) <= LONGEST_TAG for tag in self.tags):
            found.append(Problem(f"{key}.tags", f"{self.tags} are no tags", f"write texts of up to {LONGEST_TAG} characters"))
        if self.every < 1:
            found.append(Problem(f"{key}.every", f"{self.every} is not a number of steps", "use 1 for a row every step"))
        return found
