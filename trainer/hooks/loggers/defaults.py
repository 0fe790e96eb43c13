"""Build the loggers of a run.

Rows come from `Hook.on_metrics` once their numbers are on the host, so loggers never make the GPU wait.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..base import Hook
from .config import LoggingConfig
from .metrics_file import MetricsFile
from .progress_line import ProgressLine
from .tensorboard import TensorBoard
from .weights_and_biases import WandB


def default_loggers(config: LoggingConfig, output_dir: Path, run_config: Mapping[str, Any]) -> list[Hook]:
    """Build the loggers chosen by `logging`, the metrics file first."""
    loggers: list[Hook] = [MetricsFile(output_dir / "metrics.jsonl", config.every)]
    if config.progress:
        loggers.append(ProgressLine())
    if config.tensorboard:
        loggers.append(TensorBoard(output_dir / "tensorboard", config.every))
    if config.wandb:
        loggers.append(WandB(config, output_dir, run_config))
    return loggers
