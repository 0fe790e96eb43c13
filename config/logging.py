"""Config of `logging`: where a run says how it goes."""

from __future__ import annotations

from dataclasses import dataclass


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
