"""`incidents.jsonl` in a run's folder: what has happened to the run besides training, one JSON object a line.

    IncidentLog(output_dir).write(Incident("bad_step", "step 120: …", step=120, rank=3, details={"samples": [7, 9]}))

Whoever notices something writes it once for the run: rank 0 what all ranks know alike, the launcher what has become of a rank.
The file is kept over restarts and resumes; another run that takes the folder over moves it aside, as it does `metrics.jsonl`.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

INCIDENTS = "incidents.jsonl"
"""Name of the file in a run's folder."""


@dataclass(frozen=True)
class Incident:
    """Something that happened to a run.

    kind     what it was, one word for programs to search for (docs/resilience.md lists them): "hang", "death", …
    message  the sentence that people were told, without its details
    step     the step that was under way, counted from 1; None: none was
    rank     the rank that it happened to, or that caused it; None: all ranks alike, or nobody knows
    host     of that rank; default: this machine
    pid      process id of that rank on its host; None: not known
    phase    what that rank was doing: the name of a `Phase`; None: not known
    details  what else is known, plain JSON
    time     seconds since 1970
    """

    kind: str
    message: str
    step: int | None = None
    rank: int | None = None
    host: str | None = field(default_factory=socket.gethostname)
    pid: int | None = None
    phase: str | None = None
    details: Mapping[str, Any] = field(default_factory=dict[str, Any])
    time: float = field(default_factory=time.time)

    @classmethod
    def here(cls, kind: str, message: str, step: int | None = None, **more: Any) -> Incident:
        """Make an incident of this process: its rank, host and pid are filled in."""
        return cls(kind, message, step, rank=int(os.environ.get("RANK", "0")), pid=os.getpid(), **more)


class IncidentLog:
    """Appends incidents to a run's file. A fault of the disk is warned of once, and never ends the run.

    What could not be written is kept for the next `write` or `retry`: the disk that fails may be the incident.
    """

    def __init__(self, output_dir: Path) -> None:
        self.path = output_dir / INCIDENTS
        self._warned = False
        self._unwritten = b""

    def write(self, incident: Incident) -> None:
        """Append an incident. One system call writes the whole line, so that lines of several processes don't mix."""
        line = json.dumps(asdict(incident), allow_nan=True, default=str) + "\n"
        self._append(self._unwritten + line.encode())

    def retry(self) -> None:
        """Write what could not be written before."""
        if self._unwritten:
            self._append(self._unwritten)

    def _append(self, lines: bytes) -> None:
        self._unwritten = lines
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                written = os.write(descriptor, lines)
            finally:
                os.close(descriptor)
            if written < len(lines):
                whole = lines.rfind(b"\n", 0, written) + 1
                self._unwritten = b"\n" * (whole < written) + lines[whole:]  # behind a line that a full disk has torn
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._unwritten = b""
        except OSError as error:
            if not self._warned:
                log.warning("%s can't be written to: %s; incidents are only in this log", self.path, error.strerror or error)
            self._warned = True


def read_incidents(output_dir: Path) -> Iterator[dict[str, Any]]:
    """Yield the incidents of a run's folder, oldest first. A line that a crash has torn is passed over."""
    try:
        lines = (output_dir / INCIDENTS).read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return
    for line in lines:
        try:
            row: Any = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and "kind" in row:
            yield row
