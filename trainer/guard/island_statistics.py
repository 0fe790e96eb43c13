"""Keep the guard's statistic of each island (`optim.local`) in checkpoints, as a row of an array.

The JSON state of a checkpoint is the first process's, and so the first island's. Another island's losses and gradient norms are
those of its own part of each batch and of its own weights: its statistic is its own, too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ...optim.optimizers.own_arrays import RUN
from ...parallel.box import Box
from ...parallel.fragment import Fragment
from ...parallel.mesh import Mesh
from .guard import StepGuard
from .spikes import WINDOW

STATISTICS = "islands.guard"
"""Name of the array, (islands of the recipe, numbers of one)."""
_COUNTS = ("accepted", "bad_steps", "suspected", "batch", "in_a_row", "good_in_a_row")
_NONE = -1.0
_KNOWN = 1.0


class IslandStatistics:
    """This process's island's row, and those of islands that are absent, of which nothing is known.

    A row: 1 if it is known, else no number; the counts of the guard's state; losses, and logarithms of gradient norms, of
    accepted steps.
    """

    def __init__(self, mesh: Mesh, guard: StepGuard, islands: int) -> None:
        """mesh: of all islands; islands: of the recipe, of which some may be lost."""
        self._guard, self._island, self._islands = guard, mesh.island_number, islands
        self._present = mesh.layout.islands
        width = 1 + len(_COUNTS) + 2 * WINDOW
        self._row, self._absent = (
            torch.full((rows, width), math.nan, dtype=torch.float64, device=mesh.device)
            for rows in (1, islands - self._present)
        )

    def to_save(self) -> Iterator[Fragment]:
        """Yield the rows that a checkpoint of this moment holds, of this process."""
        self._row.copy_(torch.tensor([_row_of(self._guard.state_dict())], dtype=torch.float64))
        self._absent.fill_(math.nan)
        yield from self._fragments()

    def to_restore(self) -> Iterator[Fragment]:
        """Yield the rows that a checkpoint is read into. Nothing is known until that has been done."""
        self._row.fill_(math.nan)
        yield from self._fragments()

    def _fragments(self) -> Iterator[Fragment]:
        for first, rows in ((self._island, self._row), (self._present, self._absent)):
            if len(rows):
                shape = self._islands, rows.shape[1]
                yield Fragment(STATISTICS, RUN, shape, Box((first, 0), tuple(rows.shape)), rows)

    def restored(self) -> dict[str, Any] | None:
        """Return the guard's state of this island in the checkpoint that was read; None if it holds none."""
        known, *numbers = self._row[0].tolist()
        return _state_of(numbers) if known == _KNOWN else None


def _row_of(state: Mapping[str, Any]) -> list[float]:
    window = [list(pair) for pair in state["window"]]
    window += [[_NONE, _NONE]] * (WINDOW - len(window))
    counts = [_NONE if state[name] is None else float(state[name]) for name in _COUNTS]
    return [_KNOWN, *counts, *(loss for loss, _ in window), *(norm for _, norm in window)]


def _state_of(numbers: list[float]) -> dict[str, Any]:
    counts = {name: round(number) for name, number in zip(_COUNTS, numbers, strict=False)}
    losses, norms = numbers[len(_COUNTS) :][:WINDOW], numbers[len(_COUNTS) + WINDOW :]
    held = min(counts["accepted"], WINDOW)
    suspected = None if counts["suspected"] == _NONE else counts["suspected"]
    window = [[loss, norm] for loss, norm in zip(losses[:held], norms, strict=False)]
    return {**counts, "suspected": suspected, "window": window}
