"""Event files for TensorBoard."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...loop import Loop
from .base import OptionalLogger

if TYPE_CHECKING:
    import numpy as np


class TensorBoard(OptionalLogger):
    """Writes a copy of metrics.jsonl as TensorBoard event files.

    Needs the extra meshloom[tensorboard].
    """

    title = "TensorBoard"

    def __init__(self, folder: Path, every: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        super().__init__(every)
        self._folder = folder
        self._open = SummaryWriter
        self._writer: Any = None

    def on_run_accepted(self, loop: Loop) -> None:
        """Open the writer; it hides earlier events of steps that are repeated."""

        def open_writer() -> None:
            self._writer = self._open(str(self._folder), purge_step=loop.progress.step + 1)

        self.attempt(open_writer)

    def send(self, row: dict[str, Any]) -> None:
        """Pass the row's numbers to the writer, whose thread writes them to disk. Raises what that met at an earlier row."""
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float):
                self._writer.add_scalar(name, value, row["step"])

    def on_picture(self, loop: Loop, name: str, picture: np.ndarray) -> None:
        """Pass a picture on."""
        self.attempt(lambda: self._writer.add_image(name, picture, loop.progress.step, dataformats="HWC"))

    def end(self) -> None:
        """Flush and close."""
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()
