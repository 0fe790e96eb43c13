"""Read the metrics that a run has written."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def steps_of(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a metrics file that belong to steps."""
    return [row for row in _rows(path) if "tokens_per_second" in row] if path.exists() else []


def last_numbers(path: Path) -> dict[str, float]:
    """Return the last step, loss and validation loss of a metrics file; {} where there is none."""
    found: dict[str, float] = {}
    for row in _rows(path) if path.exists() else ():
        found |= {name: row[name] for name in ("step", "loss", "eval_loss") if isinstance(row.get(name), int | float)}
    return found


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a metrics file."""
    for line in path.read_text(errors="replace").splitlines():
        with contextlib.suppress(ValueError):  # a row that is just being written
            yield json.loads(line)
