"""Progress: how far a run has come, and by which batches. The only state a schedule needs (rule R5)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .history import BatchHistory, ChangePoint


@dataclass(frozen=True)
class Progress:
    """Counters at the beginning of a step. A learning rate depends on nothing else.

    step     optimizer updates done
    samples  samples consumed by them
    tokens   tokens (positions, padding included) consumed by them: samples × seq_len
    batch    samples in the step about to be taken
    history  the batches of all steps up to that one; empty: not recorded, and every step counts as equally long
    """

    step: int = 0
    samples: int = 0
    tokens: int = 0
    batch: int = 0
    history: BatchHistory = BatchHistory()

    @property
    def point(self) -> ChangePoint:
        """The counters, as a point of the history."""
        return ChangePoint(self.step, self.samples, self.tokens, self.batch)

    def before(self, batch: int, seq_len: int) -> Progress:
        """Return the progress at the beginning of a step of `batch` samples of `seq_len` tokens, recorded in the history."""
        point = self.point._replace(batch=batch)
        return Progress(*point, self.history.extended(point, seq_len))

    def after(self, samples: int, tokens: int) -> Progress:
        """Return the progress after a step of this many samples and tokens."""
        return Progress(self.step + 1, self.samples + samples, self.tokens + tokens, samples, self.history)

    def state_dict(self) -> dict[str, Any]:
        """Return the state as JSON values."""
        return {**self.point._asdict(), "history": self.history.as_json()}

    @classmethod
    def from_state(cls, state: dict[str, Any], first_batch: int) -> Progress:
        """Restore what `state_dict` returned.

        first_batch: samples of the run's first step, for states saved before there was a history. Past steps then count
        as equally long, which is exact where the batch never changed.
        """
        point = ChangePoint(*(state[name] for name in ChangePoint._fields))
        if "history" in state:
            return cls(*point, BatchHistory.from_json(state["history"]))
        first = ChangePoint(0, 0, 0, first_batch)
        constant = point.samples == point.step * first_batch
        return cls(*point, BatchHistory((first,) if constant else (first, point)))


BEGINNING = Progress()
"""The progress of a run that has not taken a step."""
