"""Files in a run's folder through which machines agree on who leads. No machine's death takes them away.

A term is the time of one leader. Whoever makes the file of the next term first leads it; all others follow the newest term.
The leader renews a lease beside it (`lease.py`), and nobody begins a term while the last one's lease moves.
A leader that finds a newer term than its own becomes one of the others.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ... import __version__

MEETING = ".nodes"
"""Name of the folder in a run's folder."""
OUTCOME = "outcome"
"""Name of the file with the exit code of the run."""
OUTCOME_FILE = "MESHLOOM_OUTCOME"
"""Environment variable with a file that gets it, too: of a job whose machines end with codes of their own."""
RELEASED = 10**19
"""Counter of a lease that was given up."""


@dataclass(frozen=True)
class Term:
    """The time of one leader: its number, and where the leader listens.

    run      a name that all terms of a run have, from its first on: agents of other runs don't know it
    version  of the leader's Meshloom
    """

    number: int
    id: str
    host: str
    port: int
    run: str = field(default_factory=lambda: f"run-{secrets.token_hex(4)}")
    version: str = __version__

    @property
    def machine(self) -> str:
        """The name of the leader's machine."""
        return self.id.rsplit("-", 2)[0]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Term:
        """Read what another version may have written: its run and version are empty where it did not say them."""
        number, port = int(values["number"]), int(values["port"])
        return cls(number, values["id"], values["host"], port, values.get("run", ""), values.get("version", ""))


class Terms:
    """The terms of one launch of a run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def newest(self) -> Term | None:
        """Return the newest term; None before the first."""
        found = sorted(self.folder.glob("term-*.json"), reverse=True)
        for path in found:
            with contextlib.suppress(OSError, ValueError, TypeError, KeyError):  # OSError: removed meanwhile
                return Term.from_dict(json.loads(path.read_text()))
        return None

    def claim(self, term: Term) -> bool:
        """Make a term. Return whether this machine was the first to make one of its number."""
        beside = self.folder / f"{term.id}.new"
        try:
            beside.write_text(json.dumps(asdict(term)))
            os.link(beside, self._path(term.number))  # exclusive, on shared file systems too
        except FileExistsError:
            return False
        finally:
            beside.unlink(missing_ok=True)
        if term.number == 1:
            (self.folder / OUTCOME).unlink(missing_ok=True)  # of an earlier launch
        return True

    def is_over(self, number: int) -> bool:
        """Return whether a newer term has begun, or the run has ended. Cheap: no folder is listed."""
        return self._path(number + 1).exists() or not self._path(number).exists()

    # ---- the lease of a term

    def renew(self, number: int, count: int) -> None:
        """Write a lease's counter, in place: readers on a network file system see it at their next open."""
        file = os.open(self._lease(number), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            os.pwrite(file, f"{count:020d}".encode(), 0)
        finally:
            os.close(file)

    def release(self, number: int) -> None:
        """Give a lease up."""
        self.renew(number, RELEASED)

    def lease(self, number: int) -> int | None:
        """Return a lease's counter; 0 before the first renewal, None once it was given up."""
        try:
            count = int(self._lease(number).read_text())
        except (FileNotFoundError, ValueError):
            return 0
        return None if count == RELEASED else count

    # ---- machines that can't reach the leader

    def stand_apart(self, number: int, machine: str, host: str) -> None:
        """Tell that a machine can't reach the leader of a term, which goes on."""
        self._apart(number, machine).write_text(host)

    def rejoin(self, number: int, machine: str) -> None:
        """Take that back."""
        self._apart(number, machine).unlink(missing_ok=True)

    def apart(self, number: int) -> list[str]:
        """Return the hosts that can't reach the leader of a term."""
        found: list[str] = []
        for path in self.folder.glob(self._apart(number, "*").name):
            with contextlib.suppress(FileNotFoundError):  # the machine has joined meanwhile
                found.append(path.read_text())
        return sorted(found)

    # ---- the end

    def end(self, term: Term, code: int) -> bool:
        """Write how the run has ended in its last term, and remove its terms: a later launch begins with its own.

        Return False, and touch nothing, where another leader has begun a newer term: the run goes on with it. Files of another
        run's machines stay.
        """
        newest = self.newest()
        if newest is None or (newest.run, newest.number) != (term.run, term.number):
            return False
        for path in [self.folder / OUTCOME, *([Path(told)] if (told := os.environ.get(OUTCOME_FILE)) else [])]:
            beside = path.with_name(f"{path.name}.new")
            beside.write_text(str(code))
            beside.replace(path)
        for pattern in ("refused-*", "apart-*", "lease-*", "term-*.json"):  # terms last: without one, the outcome is looked for
            for path in self.folder.glob(pattern):
                if pattern == "refused-*" or _number(path) <= term.number:
                    path.unlink(missing_ok=True)
        return True

    def outcome(self) -> int | None:
        """Return how the run has ended; None if it goes on."""
        try:
            return int((self.folder / OUTCOME).read_text())
        except (OSError, ValueError):
            return None

    def _path(self, number: int) -> Path:
        return self.folder / f"term-{number:06d}.json"

    def _apart(self, number: int, machine: str) -> Path:
        return self.folder / f"apart-{number:06d}-{machine}"

    def _lease(self, number: int) -> Path:
        return self.folder / f"lease-{number:06d}"


def _number(path: Path) -> int:
    """Return the number of the term that a file belongs to."""
    return int(path.stem.split("-")[1])


def meeting_folder(output_dir: Path) -> Path:
    """Return the folder in which the machines of a launch meet: one for each srun of each start of a SLURM job."""
    job = os.environ.get("SLURM_JOB_ID")
    start = f"{os.environ.get('SLURM_RESTART_COUNT', '0')}.{os.environ.get('SLURM_STEP_ID', '0')}"
    return output_dir / MEETING / (f"job-{job}.{start}" if job else "by-hand")
