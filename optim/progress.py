"""Progress: how far a run has come, and by which batches. The only state a schedule needs (rule R5)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .history import BatchHistory, ChangePoint


@dataclass(frozen=True)
class Progress:
    """Counters at the beginning of a step: nothing else decides a learning rate.

    step     optimizer updates done
    samples  samples consumed by them
    tokens   tokens (positions, padding included) consumed by them: samples × seq_len
    batch    samples in the step about to be taken
    history  what all steps up to that one were worth; empty: nobody has noted it, and every step is taken to have been alike
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
        """The progress at the beginning of a step of `batch` samples with `seq_len` tokens each, noted in the history."""
        point = self.point._replace(batch=batch)
        return Progress(*point, self.history.extended(point, seq_len))

    def after(self, samples: int, tokens: int) -> Progress:
        """The progress once a step of this many samples and tokens is done."""
        return Progress(self.step + 1, self.samples + samples, self.tokens + tokens, samples, self.history)

    def state_dict(self) -> dict[str, Any]:
        """As plain JSON."""
        return {**self.point._asdict(), "history": self.history.as_json()}

    @classmethod
    def from_state(cls, state: dict[str, Any], first_batch: int) -> Progress:
        """Take back what `state_dict` gave.

        first_batch: samples of the run's first step, for states from before the history was kept. Past steps then count as
        equally long, which is exact where the batch never changed.
        """
        point = ChangePoint(*(state[name] for name in ChangePoint._fields))
        if "history" in state:
            return cls(*point, BatchHistory.from_json(state["history"]))
        first = ChangePoint(0, 0, 0, first_batch)
        constant = point.samples == point.step * first_batch
        return cls(*point, BatchHistory((first,) if constant else (first, point)))
