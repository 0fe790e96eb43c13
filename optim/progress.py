"""Progress: how far a run has come. The only state a schedule needs (rule R5)."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Progress:
    """Counters at the beginning of a step: nothing else decides a learning rate.

    step     optimizer updates done
    samples  samples consumed by them
    tokens   tokens (positions, padding included) consumed by them: samples × seq_len
    batch    samples in the step about to be taken
    """

    step: int = 0
    samples: int = 0
    tokens: int = 0
    batch: int = 0

    def after(self, samples: int, tokens: int) -> Progress:
        """The progress once a step of this many samples and tokens is done."""
        return Progress(self.step + 1, self.samples + samples, self.tokens + tokens, samples)

    def state_dict(self) -> dict[str, int]:
        """As plain JSON."""
        return asdict(self)
