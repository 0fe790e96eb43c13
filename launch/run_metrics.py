"""Read the metrics that a run has written."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any


def steps_of(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a metrics file that belong to steps."""
    if not path.exists():
        return []
    rows: list[dict[str, Any]] = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(ValueError):  # a row that is just being written
            rows.append(json.loads(line))
    return [row for row in rows if "tokens_per_second" in row]


def last_numbers(path: Path) -> dict[str, float]:
    """Return the last step, loss and validation loss of a metrics file; {} where there is none."""
    found: dict[str, float] = {}
    with contextlib.suppress(OSError):
        for line in path.read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError):  # a row that is just being written
                row: dict[str, Any] = json.loads(line)
                found |= {name: row[name] for name in ("step", "loss", "eval_loss") if isinstance(row.get(name), int | float)}
    return found
