"""Samples, micro-batches and the global batch.

A step first draws its global batch, a range of sample indices (rule R1). An assignment (`assignment.py`) then maps it to ranks
and micro-batches; it never changes which samples are in the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast, runtime_checkable

from ..config.lazy import numpy as np

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from ..kernels.documents import Documents


IGNORED = -100  # target of a position that carries no loss: padding, or a document's first token behind another document


@dataclass(frozen=True)
class Sample:
    """One training sequence.

    tokens     (seq_len,) int64: what the model reads
    targets    (seq_len,) int64: the next token at each position, or IGNORED
    documents  (seq_len,) int64: index of the document each position belongs to, counted from 0 in this sample, or None
               where attention crosses documents; padding has a document of its own
    """

    tokens: np.ndarray
    targets: np.ndarray
    documents: np.ndarray | None = None

    def part(self, start: int, stop: int) -> Sample:
        """Return the tokens and targets of positions [start, stop)."""
        return Sample(self.tokens[start:stop], self.targets[start:stop])


class Samples(Protocol):
    """An endless, randomly accessible sequence of samples: the k-th is a function of (recipe, seed, k) alone (R1)."""

    seq_len: int
    vocabulary: int

    def __getitem__(self, index: int) -> Sample:
        """Return the k-th sample of the run, k ≥ 0."""
        ...


@runtime_checkable
class SamplesInParts(Protocol):
    """Samples that tell their documents without reading tokens, and read a part of one alone."""

    def lengths(self, index: int) -> NDArray[np.int64]:
        """Return the lengths of the k-th sample's documents, in order, without the padding at its end."""
        ...

    def part(self, index: int, start: int, stop: int) -> Sample:
        """Return the tokens and targets of positions [start, stop) of the k-th sample, without its documents."""
        ...


def document_lengths(samples: object, index: int) -> NDArray[np.int64]:
    """Return the lengths of a sample's documents. A sample without document boundaries is one document.

    Samples that can't tell are read; padding at the end then counts as a document.
    """
    if isinstance(samples, SamplesInParts):
        return samples.lengths(index)
    sample = cast(Samples, samples)[index]
    if sample.documents is None:
        return np.array([len(sample.tokens)], np.int64)
    begins = np.flatnonzero(np.diff(sample.documents, prepend=sample.documents[0] - 1))
    return np.diff(begins, append=len(sample.tokens)).astype(np.int64)


def sample_part(samples: object, index: int, start: int, stop: int) -> Sample:
    """Return the tokens and targets of positions [start, stop) of a sample, without its documents."""
    if isinstance(samples, SamplesInParts):
        return samples.part(index, start, stop)
    return cast(Samples, samples)[index].part(start, stop)


@dataclass(frozen=True)
class GlobalBatch:
    """The samples `[first, first + count)` of the run."""

    first: int
    count: int

    def indices(self) -> range:
        """Return the sample indices in run order."""
        return range(self.first, self.first + self.count)


@dataclass(frozen=True)
class MicroBatch:
    """The samples that a rank passes through the model at once: B samples of S positions.

    tokens_BS, targets_BS  int64
    documents              the document of each position; None where attention crosses documents
    positions_BS           int64: where each position lies in its document, if the micro-batch alone does not tell
    """

    tokens_BS: torch.Tensor
    targets_BS: torch.Tensor
    documents: Documents | None = None
    positions_BS: torch.Tensor | None = None

    @classmethod
    def collate(cls, samples: Sequence[Sample]) -> MicroBatch:
        """Stack samples of one length."""

        # Not at the top: commands that only check a config or a corpus start without torch.
        import torch

        from ..kernels.documents import Documents

        def stack(arrays: Sequence[np.ndarray]) -> torch.Tensor:
            return torch.from_numpy(np.stack(arrays).astype(np.int64, copy=False))

        documents = [sample.documents for sample in samples if sample.documents is not None]
        assert len(documents) in (0, len(samples)), "samples with and without document boundaries in one batch"
        return cls(
            stack([sample.tokens for sample in samples]),
            stack([sample.targets for sample in samples]),
            Documents.of(stack(documents)) if documents else None,
        )

    @property
    def valid_tokens(self) -> int:
        """Positions that carry loss. Call it while the targets are still on the CPU."""
        return int((self.targets_BS != IGNORED).sum())

    def to(self, device: torch.device) -> MicroBatch:
        """Copy to a device, without waiting where memory is pinned."""
        return MicroBatch(
            self.tokens_BS.to(device, non_blocking=True),
            self.targets_BS.to(device, non_blocking=True),
            None if self.documents is None else self.documents.to(device),
            None if self.positions_BS is None else self.positions_BS.to(device, non_blocking=True),
        )

    def pin(self) -> MicroBatch:
        """Copy into page-locked memory."""
        return MicroBatch(
            self.tokens_BS.pin_memory(),
            self.targets_BS.pin_memory(),
            None if self.documents is None else self.documents.pin(),
            None if self.positions_BS is None else self.positions_BS.pin_memory(),
        )
