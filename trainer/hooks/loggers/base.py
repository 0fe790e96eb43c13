"""Base class of hooks that write rows of metrics."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

from ...loop import Loop
from ..base import Hook

log = logging.getLogger(__name__)


class RowLogger(Hook):
    """Writes a row for every evaluation, every save, and every step that is due.

    every  `logging.every`: steps between rows; the first and the last step of a run always have one
    """

    alone = True

    def __init__(self, every: int) -> None:
        self._every = every

    @abstractmethod
    def write(self, row: dict[str, Any]) -> None:
        """Write a row. Its `step` may be smaller than that of the row before."""

    def on_metrics(self, loop: Loop, row: dict[str, Any]) -> None:
        """Write a step's row, if it is due."""
        last = (loop.finished or loop.stopping) and row["step"] == loop.progress.step
        if row["step"] % self._every == 0 or row["step"] == 1 or last:
            self.write(row)

    def on_evaluate(self, loop: Loop, row: dict[str, Any]) -> None:
        """Write an evaluation's row."""
        self.write(row)

    def on_tasks(self, loop: Loop, row: dict[str, Any]) -> None:
        """Write the row of an evaluation on tasks."""
        self.write(row)

    def on_checkpoint(self, loop: Loop, row: dict[str, Any]) -> None:
        """Write a save's row, under the step that it saved."""
        self.write({"step": row["checkpoint_step"], **row})


class OptionalLogger(RowLogger):
    """A row logger besides metrics.jsonl. Whatever goes wrong with it ends its rows, with a warning, and never the run.

    title  its name in the warning
    """

    title = ""

    def __init__(self, every: int) -> None:
        super().__init__(every)
        self._given_up = False

    @abstractmethod
    def send(self, row: dict[str, Any]) -> None:
        """Write a row, or raise."""

    @abstractmethod
    def end(self) -> None:
        """Write what is left and release everything, or raise. Called once, also after a fault."""

    def write(self, row: dict[str, Any]) -> None:
        """Write a row, unless an earlier one could not be written."""
        self.attempt(lambda: self.send(row))

    def close(self) -> None:
        """End the logger."""
        try:
            self.end()
        except Exception as error:
            self._give_up(error)

    def attempt(self, action: Callable[[], None]) -> None:
        """Do something; if that fails, warn and do nothing from then on."""
        if self._given_up:
            return
        try:
            action()
        except Exception as error:  # a library may raise anything, at a full disk or because a process of its own was killed
            self._give_up(error)
            self.close()

    def _give_up(self, error: Exception) -> None:
        if not self._given_up:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else f"{type(error).__name__}: {error}"
            log.warning("%s gets no more of this run: %s; training goes on, and metrics.jsonl has it all", self.title, reason)
        self._given_up = True
