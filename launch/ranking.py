"""The ranking of runs by their losses: one for the report of runs, and for the table at the end of a sweep's jobs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Standing:
    """Values by which runs are ranked.

    training, validation  its last losses; None where there is none, and both of a run that has diverged
    finished              whether it has reached its length; True where nobody knows
    """

    training: float | None
    validation: float | None
    finished: bool = True


def compared_losses(runs: Sequence[Standing]) -> list[float | None]:
    """Return the loss by which each run is compared: validation losses where any run has one, or else training losses.

    The two are never compared with one another.
    """
    validated = any(run.validation is not None for run in runs)
    return [run.validation if validated else run.training for run in runs]


def ranked(runs: Sequence[Standing]) -> list[int]:
    """Return the numbers of the runs, the best first.

    Finished runs come before unfinished ones, then those without the loss that is compared, and last those without any loss.
    """
    losses = compared_losses(runs)

    def place(at: int) -> tuple[int, bool, float]:
        loss, run = losses[at], runs[at]
        if loss is None:
            return (2 if run.training is None else 1), not run.finished, 0.0
        return 0, not run.finished, loss

    return sorted(range(len(runs)), key=place)
