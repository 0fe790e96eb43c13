"""The curves of a run's numbers: along steps, tokens, samples or seconds, thinned without losing a spike."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

from ...config.lazy import numpy as np
from ..run_metrics import Metrics

AXES = {"step": "steps", "tokens": "tokens", "samples": "samples", "seconds": "time in steps"}
"""Axes along a run on which a number is drawn: the field of a step's row, and the label of the axis."""


@dataclass(frozen=True)
class Curve:
    """Values of a number, in order. x: the positions along an axis."""

    x: np.ndarray
    y: np.ndarray

    def __len__(self) -> int:
        return len(self.x)

    def thinned(self, most: int) -> Curve:
        """Keep about `most` points: of each stretch of the curve its lowest and its highest, and both ends."""
        count = len(self)
        if count <= most:
            return self
        bounds = np.linspace(0, count, max(1, most // 2) + 1).astype(int)
        kept = {0, count - 1}
        for first, last in itertools.pairwise(bounds):
            part = self.y[first:last]
            kept |= {int(first + part.argmin()), int(first + part.argmax())}
        at = sorted(kept)
        return Curve(self.x[at], self.y[at])

    def smoothed(self, share: float = 0.02) -> Curve:
        """Average over a window of this share of the curve, centred.

        Towards its beginning, where a loss is steep, the window shrinks; at its end it is cut off.
        """
        count = len(self)
        sums = np.concatenate([[0.0], np.cumsum(self.y)])
        at = np.arange(count)
        reach = np.minimum(np.ceil(count * share / 2).astype(int), at)
        last = np.minimum(at + reach + 1, count)
        return Curve(self.x, (sums[last] - sums[at - reach]) / (last - at + reach))


def curve(metrics: Metrics, name: str, axis: str = "step") -> Curve:
    """Return the curve of a number along an axis. Rows without it, or with a value that is not finite, have no point."""
    steps, values = metrics[name]
    return Curve(positions(metrics, steps, axis), values)


def positions(metrics: Metrics, steps: np.ndarray, axis: str) -> np.ndarray:
    """Return where along an axis these steps ended; between the rows of steps by interpolation."""
    if axis == "step" or not metrics.steps:
        return steps.astype(np.float64)
    rows: list[dict[str, Any]] = metrics.steps
    known = metrics.seconds if axis == "seconds" else np.array([row[axis] for row in rows], np.float64)
    return np.interp(steps, [row["step"] for row in rows], known)
