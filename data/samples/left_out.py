"""Samples that a run leaves out: they keep their numbers and places, but carry no loss and none of their tokens."""

from __future__ import annotations

from collections.abc import Callable

from ...config.lazy import numpy as np
from ..batch import IGNORED, Sample, Samples
from .rearranged import Rearranged


class LeftOut(Rearranged):
    """Samples of which some are blank: token 0 everywhere, every target ignored, documents as they are.

    The numbers of all other samples stay what they are, so a run that leaves some out meets the same batches otherwise.
    """

    def __init__(self, samples: Samples, is_left_out: Callable[[int], bool]) -> None:
        super().__init__(samples)
        self._samples, self._is_left_out = samples, is_left_out

    def place(self, index: int) -> tuple[Samples, int]:
        """Return the samples, and the same number."""
        return self._samples, index

    def __getitem__(self, index: int) -> Sample:
        """Return the k-th sample, blank where it is left out."""
        return self._of(index, super().__getitem__(index))

    def part(self, index: int, start: int, stop: int) -> Sample:
        """Return the tokens and targets of positions [start, stop), blank where the sample is left out."""
        return self._of(index, super().part(index, start, stop))

    def _of(self, index: int, sample: Sample) -> Sample:
        if not self._is_left_out(index):
            return sample
        # Not only the targets: what made a number infinite might do so again, and 0 · infinity is not 0.
        return Sample(np.zeros_like(sample.tokens), np.full_like(sample.targets, IGNORED), sample.documents)
