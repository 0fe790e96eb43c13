"""Which loggers a run has, and TensorBoard. metrics.jsonl, the progress line and Weights & Biases have files of their own.

Rows arrive through `Hook.on_metrics` when their numbers have reached the host, so nothing here makes the GPU wait. All of
these hooks belong to one process, rank 0.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from ..config import LoggingConfig
from ..config.problems import Problem
from .hooks import Hook
from .loop import Loop
from .metrics_file import MetricsFile
from .progress_line import ProgressLine
from .rows import Rows
from .weights_and_biases import WandB

log = logging.getLogger(__name__)


def default_loggers(config: LoggingConfig, output_dir: Path, run_config: DictConfig) -> list[Hook]:
    """The loggers that `logging` asks for, the run's metrics file first."""
    loggers: list[Hook] = [MetricsFile(output_dir / "metrics.jsonl", config.every)]
    if config.progress:
        loggers.append(ProgressLine())
    if config.tensorboard:
        loggers.append(TensorBoard(output_dir / "tensorboard", config.every))
    if config.wandb:
        loggers.append(WandB(config.project, output_dir, run_config, config.every))
    return loggers


def logging_problems(config: LoggingConfig) -> list[Problem]:
    """Loggers whose library is not installed."""
    return [
        Problem(f"logging.{name}", f"{name} is not installed", f"pip install 'meshloom[{name}]', or logging.{name}=false")
        for name in ("wandb", "tensorboard")
        if getattr(config, name) and importlib.util.find_spec(name) is None
    ]


class TensorBoard(Rows):
    """Event files for TensorBoard: a copy of metrics.jsonl, which a full disk ends without ending the run.

    Needs the extra meshloom[tensorboard].
    """

    def __init__(self, folder: Path, every: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        super().__init__(every)
        self._folder = folder
        self._open = SummaryWriter
        self._writer: Any = None

    def on_run_begin(self, loop: Loop) -> None:
        """Open the writer; events of steps that are done again are hidden by the new ones."""
        try:
            self._writer = self._open(str(self._folder), purge_step=loop.progress.step + 1)
        except OSError as error:
            self._give_up(error)

    def write(self, row: dict[str, Any]) -> None:
        """Hand the row's numbers to the writer, whose thread puts them on disk."""
        if self._writer is None:
            return
        try:
            for name, value in row.items():
                if name != "step" and isinstance(value, int | float):
                    self._writer.add_scalar(name, value, row["step"])
        except OSError as error:  # of an earlier row: the thread died of it
            self._give_up(error)

    def close(self) -> None:
        """Flush and close."""
        writer, self._writer = self._writer, None
        try:
            if writer is not None:
                writer.close()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        writer, self._writer = self._writer, None
        with contextlib.suppress(OSError):  # the same again
            if writer is not None:
                writer.close()
        log.warning("TensorBoard gets no more of this run: %s: %s; metrics.jsonl has it all", self._folder, error.strerror)
