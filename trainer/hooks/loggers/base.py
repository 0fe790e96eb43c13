"""Hooks that write rows of numbers somewhere: what they have in common."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from ...loop import Loop
from ..base import Hook


class Rows(Hook):
    """The base: every step that is due, every evaluation and every save is a row.

    every  `logging.every`: steps between rows; the first step always has one
    """

    alone = True

    def __init__(self, every: int) -> None:
        self._every = every

    @abstractmethod
    def write(self, row: dict[str, Any]) -> None:
        """Put down a row. It has a `step`, which is not always that of the row before it or a later one."""

    def on_metrics(self, loop: Loop, row: dict[str, Any]) -> None:
        """A step, if it is due."""
        if row["step"] % self._every == 0 or row["step"] == 1:
            self.write(row)

    def on_evaluate(self, loop: Loop, row: dict[str, Any]) -> None:
        """An evaluation."""
        self.write(row)

    def on_checkpoint(self, loop: Loop, row: dict[str, Any]) -> None:
        """How a save went, under the step that it saved."""
        self.write({"step": row["checkpoint_step"], **row})
