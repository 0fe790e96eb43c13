"""metrics.jsonl: everything that a run has measured, a JSON object a line. A full disk costs none of it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from pathlib import Path
from typing import Any

from ...loop import Loop
from .base import Rows

log = logging.getLogger(__name__)


class MetricsFile(Rows):
    """Rows are appended at once, whole or not at all; a resumed run first drops those beyond its first step.

    Rows that can't be written (a full disk, a quota, a file server away) are kept and tried again with the next one.
    Meanwhile the run goes on, and its checkpoints carry them to the run that goes on from there.
    """

    of_one_run = True

    def __init__(self, path: Path, every: int) -> None:
        super().__init__(every)
        self._path = path
        self._file: int | None = None
        self._waiting: list[str] = []
        self._fault: OSError | None = None

    def on_run_begin(self, loop: Loop) -> None:
        """Drop what is about to be done again, open the file, and write what the last run could not and did not later.

        Raises OSError where there can't be such a file.
        """
        if self._path.exists():
            lines = self._path.read_text(errors="replace").splitlines()  # a crash may have left anything at its end
            kept = [line for line in lines if _step(line) <= loop.progress.step]
            draft = self._path.with_suffix(".tmp")
            draft.write_text("".join(f"{line}\n" for line in kept if loop.progress.step))
            draft.replace(self._path)
            there = {f"{line}\n" for line in kept}  # written after the checkpoint, when there was room again
            self._waiting = [line for line in self._waiting if line not in there]
        self._file = self._opened()
        self._flush()

    def write(self, row: dict[str, Any]) -> None:
        """Append the row, behind those that still wait."""
        self._waiting.append(json.dumps(row) + "\n")
        self._flush()

    def on_run_end(self, loop: Loop, output_dir: Path) -> None:
        """Raises OSError if rows of a finished run are still not in the file: it did not end as asked."""
        self._flush()
        if self._fault is not None:
            message = f"{len(self._waiting)} rows could not be written: {self._fault.strerror}"
            raise OSError(self._fault.errno, message, str(self._path))

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def state_dict(self) -> dict[str, Any]:
        """The rows that are not in the file."""
        return {"waiting": self._waiting} if self._waiting else {}

    @property
    def waits_for_rows(self) -> bool:
        """Only while rows don't get into the file do the newest belong to its state."""
        return bool(self._waiting)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the rows that the last run could not write."""
        self._waiting = list(state.get("waiting", []))

    def _opened(self) -> int:
        return os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)

    def _flush(self) -> None:
        """Write all rows that wait. What a failed attempt left of them is taken back, so that no line is ever cut."""
        if not self._waiting:
            return
        end = None
        try:
            if self._file is None:
                self._file = self._opened()
            end = os.fstat(self._file).st_size
            data = memoryview("".join(self._waiting).encode())
            while data:
                data = data[os.write(self._file, data) :]
        except OSError as error:
            self._note(error, end)
            return
        if self._fault is not None:
            log.warning("%s can be written again; no row was lost", self._path)
        self._waiting, self._fault = [], None

    def _note(self, error: OSError, end: int | None) -> None:
        """end: the file's size before the attempt. It is opened anew for the next: a file server may have forgotten it."""
        if self._fault is None:
            what = "training goes on; rows wait in memory and in checkpoints, and are written as soon as they can be"
            log.error("%s can't be written: %s; %s", self._path, error.strerror, what)
        self._fault = error
        if self._file is not None:
            with contextlib.suppress(OSError):
                if end is not None:
                    os.ftruncate(self._file, end)
            with contextlib.suppress(OSError):
                self.close()


def _step(line: str) -> float:
    """The step of a row; infinity for a line that was cut short by a crash, so that it is dropped."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
