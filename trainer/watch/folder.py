"""The folder through which a launcher watches the ranks of its host: heartbeats, stacks, reasons of failures.

The launcher makes it, in memory where the machine has /dev/shm, and names it in an environment variable. Each attempt (each
start of the processes) has a folder of its own in it. Ranks that nobody watches find no variable, and write nothing.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WATCH_FOLDER = "MESHLOOM_WATCH_FOLDER"
"""Environment variable with the folder."""
WATCH_PORT = "MESHLOOM_WATCH_PORT"
"""Environment variable with the port on which this host's launcher would gather the news of all hosts, if rank 0 is here."""


@dataclass(frozen=True)
class AttemptFolder:
    """The files of one attempt on this host."""

    path: Path

    @classmethod
    def of(cls, root: Path, attempt: int) -> AttemptFolder:
        """Return the folder of an attempt, counted from 0."""
        return cls(root / f"attempt-{attempt}")

    @classmethod
    def mine(cls) -> AttemptFolder | None:
        """Return the folder of this rank's attempt; None if nobody watches it."""
        root = os.environ.get(WATCH_FOLDER)
        if not root or "RANK" not in os.environ:
            return None
        return cls.of(Path(root), int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")))

    @classmethod
    def newest(cls, root: Path) -> AttemptFolder | None:
        """Return the folder of the newest attempt; None before the first rank has come."""
        found = [path for path in root.glob("attempt-*") if path.name.rpartition("-")[2].isdigit()]
        return cls(max(found, key=lambda path: int(path.name.rpartition("-")[2]))) if found else None

    @property
    def run(self) -> Path:
        """Facts of the run for the launcher, JSON; local rank 0 writes it."""
        return self.path / "run.json"

    def beat(self, rank: int) -> Path:
        """Return the file of a rank's heartbeat."""
        return self.path / f"rank-{rank}.beat"

    def stack(self, rank: int) -> Path:
        """Return the file into which a rank's stack is written when it gets the signal."""
        return self.path / f"rank-{rank}.stack"

    def failure(self, rank: int) -> Path:
        """Return the file in which a rank says why it fails, JSON."""
        return self.path / f"rank-{rank}.failure"

    def ranks(self) -> list[int]:
        """Return the ranks that have a heartbeat, in order."""
        return sorted(int(path.stem.partition("-")[2]) for path in self.path.glob("rank-*.beat"))


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file so that a reader sees all of it or nothing."""
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    beside.write_text(json.dumps(content))
    beside.replace(path)


def read_json(path: Path) -> Any:
    """Read a JSON file; None if it is not there."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None
