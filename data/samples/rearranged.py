"""Samples that stand elsewhere: in another order, under other numbers, or in one of several sources."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from ..batch import Sample, Samples, document_lengths, sample_part

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Rearranged(ABC):
    """Samples of which each is one of other samples. Implements `Samples` and `SamplesInParts`."""

    def __init__(self, like: Samples) -> None:
        """like: samples of the same length and vocabulary."""
        self.seq_len = like.seq_len
        self.vocabulary = like.vocabulary

    @abstractmethod
    def place(self, index: int) -> tuple[Samples, int]:
        """Return where the k-th sample stands: the samples that have it, and its number there."""

    def __getitem__(self, index: int) -> Sample:
        """Return the k-th sample."""
        samples, number = self.place(index)
        return samples[number]

    def lengths(self, index: int) -> NDArray[np.int64]:
        """Return the lengths of the k-th sample's documents."""
        return document_lengths(*self.place(index))

    def part(self, index: int, start: int, stop: int) -> Sample:
        """Return the tokens and targets of positions [start, stop) of the k-th sample."""
        return sample_part(*self.place(index), start, stop)
