"""Base class of hooks that write rows of metrics."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from ...loop import Loop
from ..base import Hook


class RowLogger(Hook):
    """Writes a row for every evaluation, every save, and every step that is due.

    every  `logging.every`: steps between rows; the first step always has one
    """

    alone = True

    def __init__(self, every: int) -> None:
        self._every = every

    @abstractmethod
    def write(self, row: dict[str, Any]) -> None:
        """Write a row. Its `step` may be smaller than that of the row before."""

    def on_metrics(self, loop: Loop, row: dict[str, Any]) -> None:
        """Write a step's row, if it is due."""
        if row["step"] % self._every == 0 or row["step"] == 1:
            self.write(row)

    def on_evaluate(self, loop: Loop, row: dict[str, Any]) -> None:
        """Write an evaluation's row."""
        self.write(row)

    def on_checkpoint(self, loop: Loop, row: dict[str, Any]) -> None:
        """Write a save's row, under the step that it saved."""
        self.write({"step": row["checkpoint_step"], **row})
