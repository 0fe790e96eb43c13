"""Notes in the meeting folder of machines that do not take part, so that the others can tell whom they wait for in vain.

A machine whose config is wrong has no agent that could tell the leader.
"""

from __future__ import annotations

import contextlib
import json
import socket
from pathlib import Path

from .terms import meeting_folder

PREFIX = "refused-"


def write_refusal(output_dir: Path, reason: str) -> None:
    """Say why this machine does not take part in a run, if others meet there already. Never fails."""
    folder = meeting_folder(output_dir)
    with contextlib.suppress(OSError):
        if folder.is_dir():
            beside = folder / f".{PREFIX}{socket.gethostname()}.new"
            beside.write_text(json.dumps({"host": socket.gethostname(), "reason": reason}))
            beside.replace(_note(folder))


def take_back_refusal(folder: Path) -> None:
    """Remove this machine's note: it takes part now. Never fails."""
    with contextlib.suppress(OSError):
        _note(folder).unlink(missing_ok=True)


def read_refusals(folder: Path) -> list[str]:
    """Return who does not take part and why, a sentence each. A note that can't be read is passed over."""
    found: list[str] = []
    for path in sorted(folder.glob(f"{PREFIX}*")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            note = json.loads(path.read_text())
            found.append(f"{note['host']} does not take part: {note['reason']}")
    return found


def _note(folder: Path) -> Path:
    return folder / f"{PREFIX}{socket.gethostname()}"
