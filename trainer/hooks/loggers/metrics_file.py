"""metrics.jsonl: all metrics of a run, one JSON object per line. A full disk loses none of them."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import time
from pathlib import Path
from typing import Any

from ...loop import Loop
from .base import RowLogger

log = logging.getLogger(__name__)


class MetricsFile(RowLogger):
    """Appends each row at once, whole or not at all. A resumed run first drops rows after the step it resumes from.

    `time` of a row is when it was written, in seconds since 1970 (UTC).

    Rows that can't be written (a full disk, a quota, an unreachable file server) are kept, and tried again with the next one.
    Meanwhile the run continues, and its checkpoints carry these rows to a resumed run.
    """

    of_one_run = True

    def __init__(self, path: Path, every: int) -> None:
        super().__init__(every)
        self._path = path
        self._file: int | None = None
        self._waiting: list[str] = []
        self._fault: OSError | None = None

    def on_run_accepted(self, loop: Loop) -> None:
        """Drop rows of steps that are repeated, open the file, and write rows that are still waiting.

        Raises OSError if the file can't be opened.
        """
        if self._path.exists():
            lines = self._path.read_text(errors="replace").splitlines()  # a crash may have cut the last line
            kept = [line for line in lines if _step(line) <= loop.progress.step]
            draft = self._path.with_suffix(".tmp")
            draft.write_text("".join(f"{line}\n" for line in kept if loop.progress.step))
            draft.replace(self._path)
            there = {f"{line}\n" for line in kept}  # written after the checkpoint, once there was room
            self._waiting = [line for line in self._waiting if line not in there]
        self._file = self._opened()
        self._flush()

    def write(self, row: dict[str, Any]) -> None:
        """Append the row, with the time of now, after those that still wait. JSON has no name for what is not finite."""
        finite = {name: value for name, value in row.items() if not isinstance(value, float) or math.isfinite(value)}
        self._waiting.append(json.dumps({**finite, "time": round(time.time(), 3)}) + "\n")
        self._flush()

    def on_run_end(self, loop: Loop, output_dir: Path) -> None:
        """Write waiting rows. Raises OSError if they still can't be written: the run has then not succeeded."""
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
        """Return the rows that are not in the file yet."""
        return {"waiting": self._waiting} if self._waiting else {}

    @property
    def waits_for_rows(self) -> bool:
        """True while the state holds rows, which is only while they can't be written."""
        return bool(self._waiting)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the rows that the run before could not write."""
        self._waiting = list(state.get("waiting", []))

    def _opened(self) -> int:
        return os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)

    def _flush(self) -> None:
        """Write all waiting rows. A failed attempt is undone, so that no line is ever cut."""
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
            self._undo(error, end)
            return
        if self._fault is not None:
            log.warning("%s can be written again; no row was lost", self._path)
        self._waiting, self._fault = [], None

    def _undo(self, error: OSError, end: int | None) -> None:
        """Log a failed write and truncate the file to `end`, its size before.

        The file is closed, and opened again for the next attempt: a file server may have lost the handle.
        """
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
    """Return the step of a row; infinity for a line that a crash cut short, so that it is dropped."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
