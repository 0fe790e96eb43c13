"""Files in a run's folder through which machines agree on who leads. No machine's death takes them away.

A term is the time of one leader. Whoever makes the file of the next term first leads it; all others follow the newest term.
A leader that is cut off from the others finds a newer term here, and becomes one of them.
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

MEETING = ".nodes"
"""Name of the folder in a run's folder."""
OUTCOME = "outcome"
"""Name of the file with the exit code of the run."""
OUTCOME_FILE = "MESHLOOM_OUTCOME"
"""Environment variable with a file that gets it, too: of a job whose machines end with codes of their own."""


@dataclass(frozen=True)
class Term:
    """The time of one leader: its number, and where the leader listens."""

    number: int
    id: str
    host: str
    port: int


class Terms:
    """The terms of one launch of a run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def newest(self) -> Term | None:
        """Return the newest term; None before the first."""
        found = sorted(self.folder.glob("term-*.json"), reverse=True)
        for path in found:
            with contextlib.suppress(OSError, ValueError, TypeError):  # OSError: removed meanwhile
                return Term(**json.loads(path.read_text()))
        return None

    def claim(self, term: Term) -> bool:
        """Make a term. Return whether this machine was the first to make one of its number."""
        beside = self.folder / f"{term.id}.new"
        beside.write_text(json.dumps(asdict(term)))
        try:
            os.link(beside, self.folder / f"term-{term.number:06d}.json")  # exclusive, on shared file systems too
        except FileExistsError:
            return False
        finally:
            beside.unlink()
        return True

    def end(self, code: int) -> None:
        """Write how the run has ended, and remove the terms: a later launch begins with its own."""
        for path in [self.folder / OUTCOME, *([Path(told)] if (told := os.environ.get(OUTCOME_FILE)) else [])]:
            beside = path.with_name(f"{path.name}.new")
            beside.write_text(str(code))
            beside.replace(path)
        for path in self.folder.glob("term-*.json"):
            path.unlink(missing_ok=True)

    def outcome(self) -> int | None:
        """Return how the run has ended; None if it goes on."""
        try:
            return int((self.folder / OUTCOME).read_text())
        except (OSError, ValueError):
            return None


def meeting_folder(output_dir: Path) -> Path:
    """Return the folder in which the machines of a launch meet: one for each srun of each start of a SLURM job."""
    job = os.environ.get("SLURM_JOB_ID")
    start = f"{os.environ.get('SLURM_RESTART_COUNT', '0')}.{os.environ.get('SLURM_STEP_ID', '0')}"
    return output_dir / MEETING / (f"job-{job}.{start}" if job else "by-hand")
