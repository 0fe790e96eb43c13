"""Event files for TensorBoard."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Any

from ...loop import Loop
from .base import RowLogger

log = logging.getLogger(__name__)


class TensorBoard(RowLogger):
    """Writes a copy of metrics.jsonl as TensorBoard event files. A full disk ends the copy, not the run.

    Needs the extra meshloom[tensorboard].
    """

    def __init__(self, folder: Path, every: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        super().__init__(every)
        self._folder = folder
        self._open = SummaryWriter
        self._writer: Any = None

    def on_run_begin(self, loop: Loop) -> None:
        """Open the writer; it hides earlier events of steps that are repeated."""
        try:
            self._writer = self._open(str(self._folder), purge_step=loop.progress.step + 1)
        except OSError as error:
            self._give_up(error)

    def write(self, row: dict[str, Any]) -> None:
        """Pass the row's numbers to the writer, whose thread writes them to disk."""
        if self._writer is None:
            return
        try:
            for name, value in row.items():
                if name != "step" and isinstance(value, int | float):
                    self._writer.add_scalar(name, value, row["step"])
        except OSError as error:  # of an earlier row, on which the writer's thread failed
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
