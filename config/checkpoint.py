"""Config of `checkpoint`: when the run's state is saved, how, and for how long."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class CheckpointConfig:
    """every: steps between saves (null: only at the end; 0: never); keep: newest complete steps that stay on disk (0: all)."""

    every: int | None = 500
    keep: int = 2
