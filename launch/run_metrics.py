"""Read the metrics that a run has written."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..config.lazy import numpy as np


@dataclass(frozen=True)
class Metrics:
    """The rows of a run's metrics.jsonl, as they were written.

    A step that was taken again after a stop counts once: its newest row is kept.
    """

    rows: Sequence[dict[str, Any]]

    @classmethod
    def read(cls, path: Path) -> Metrics:
        """Read a file; without one there are no rows. A line that a crash or a write under way has cut is passed over."""
        return cls([row for row in _lines(path) if row is not None] if path.exists() else [])

    @classmethod
    def read_undamaged(cls, path: Path) -> Metrics:
        """Read a file of which nothing may be missing but its last line, which a crash may have cut.

        Raises OSError if it can't be opened, ValueError for another line that is no row: a resumed run leaves none behind.
        """
        rows = list(_lines(path))
        bad = next((number for number, row in enumerate(rows[:-1], 1) if row is None), None)
        if bad is not None:
            raise ValueError(f"{path.name} is damaged: line {bad} is no row of metrics")
        return cls([row for row in rows if row is not None])

    @cached_property
    def steps(self) -> list[dict[str, Any]]:
        """The rows of steps, in order of the steps."""
        return _newest(row for row in self.rows if "tokens_per_second" in row)

    @cached_property
    def evaluations(self) -> list[dict[str, Any]]:
        """The evaluations, one row for each step.

        A row has `eval_loss`, `validation/<name>/loss` of each source, and `tasks/<task>/<metric>`, where they were evaluated.
        """
        found: dict[int, dict[str, Any]] = {}
        for row in self.rows:
            if "eval_loss" in row or any(map(is_source_loss, row)) or any(map(is_task, row)):
                found[row["step"]] = found.get(row["step"], {}) | row  # tasks have a row of their own
        return [found[step] for step in sorted(found)]

    @cached_property
    def saves(self) -> list[dict[str, Any]]:
        """The rows of checkpoints, in order of the steps."""
        return _newest(row for row in self.rows if "checkpoint_step" in row)

    @cached_property
    def tasks(self) -> list[dict[str, Any]]:
        """The rows of evaluations on tasks, in order of the steps: `tasks/<task>/<metric>`."""
        return _newest(row for row in self.rows if any(name.startswith("tasks/") for name in row))

    @cached_property
    def names(self) -> list[str]:
        """The names of all numbers, in the order in which they first appear."""
        return list({name: None for row in self.rows for name, value in row.items() if _is_number(value)})

    def __getitem__(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the steps, and the values of a number at them. Both are empty if no row has it."""
        rows = next(
            (kind for kind in (self.steps, self.evaluations, self.saves, self.tasks) if any(name in row for row in kind)), []
        )
        found = [(row["step"], row[name]) for row in rows if _is_number(row.get(name))]
        return np.array([step for step, _ in found], np.int64), np.array([value for _, value in found], np.float64)

    @cached_property
    def seconds(self) -> np.ndarray:
        """Seconds that training took to the end of each of `steps`: without evaluations, stops and steps taken again.

        With `logging.every` above 1, steps without a row are taken to last as long as the next one that has one.
        """
        taken = np.array([row["step_seconds"] for row in self.steps], np.float64)
        steps = np.array([row["step"] for row in self.steps], np.int64)
        return np.cumsum(taken * np.diff(steps, prepend=steps[:1] - 1))


def is_source_loss(name: str) -> bool:
    """Return whether a number is the validation loss of a single source or named set."""
    return name.startswith("validation/") and name.endswith("/loss")


def is_task(name: str) -> bool:
    """Return whether a number is the result of a benchmark task: `tasks/<task>/<metric>`."""
    return name.startswith("tasks/")


def steps_of(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a metrics file that belong to steps."""
    return Metrics.read(path).steps


def last_numbers(metrics: Metrics) -> dict[str, float]:
    """Return the last step, loss and validation loss of a run; {} where there is none.

    Rows have no number that is not finite, so the loss of a step without one is nan, until an evaluation finds a loss again.
    """
    names = ("step", "loss", "eval_loss")
    found: dict[str, float] = {}
    for row in metrics.rows:
        if "tokens_per_second" in row:
            found["loss"] = math.nan
        elif _is_number(row.get("eval_loss")) and math.isnan(found.get("loss", 0.0)):
            del found["loss"]
        found |= {name: row[name] for name in names if _is_number(row.get(name))}
    return {name: found[name] for name in names if name in found}


def shown_numbers(numbers: Mapping[str, float]) -> list[str]:
    """Return numbers with their names for a line of a table: whole ones in full, others in four digits."""
    return [f"{name} {value:,}" if isinstance(value, int) else f"{name} {value:,.4g}" for name, value in numbers.items()]


def _newest(rows: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    by_step = {row["step"]: row for row in rows}
    return [by_step[step] for step in sorted(by_step)]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _lines(path: Path) -> Iterator[dict[str, Any] | None]:
    """Yield the row of each line of a metrics file; None for a line that is none, as while it is being written."""
    with path.open(errors="replace") as lines:
        for line in lines:
            row = None
            with contextlib.suppress(ValueError):
                row = json.loads(line)
            yield row if isinstance(row, dict) and _is_number(row.get("step")) else None
