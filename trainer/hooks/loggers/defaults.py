"""Which loggers a run has.

Rows arrive through `Hook.on_metrics` when their numbers have reached the host, so nothing here makes the GPU wait.
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
    """The loggers that `logging` asks for, the run's metrics file first."""
    loggers: list[Hook] = [MetricsFile(output_dir / "metrics.jsonl", config.every)]
    if config.progress:
        loggers.append(ProgressLine())
    if config.tensorboard:
        loggers.append(TensorBoard(output_dir / "tensorboard", config.every))
    if config.wandb:
        loggers.append(WandB(config.project, output_dir, run_config, config.every))
    return loggers
