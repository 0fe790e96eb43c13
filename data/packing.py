"""Packing: how documents of any length become samples of one length. S: seq_len."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .batch import IGNORED, Sample
from .reader import TokenShards


class Concatenated:
    """Concatenate and split: sample k reads tokens [kS, kS+S) and predicts [kS+1, kS+S+1), whatever documents they are of.

    document_mask  number the documents within each sample, so that attention stays inside them, and take the loss off
                   the position before a document's first token

    The last, incomplete sample is dropped. Raises ValueError where there is not even one.
    """

    def __init__(self, shards: TokenShards, seq_len: int, document_mask: bool = False) -> None:
        self.seq_len = seq_len
        self.vocabulary = shards.vocabulary
        self._shards = shards
        self._document_mask = document_mask
        self._count = (shards.tokens - 1) // seq_len
        if self._count < 1:
            raise ValueError(
                f"data.seq_len: {shards.folder} has {shards.tokens} tokens, too few for one sample of {seq_len}; "
                f"use at most {shards.tokens - 1}, or a larger corpus"
            )

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Sample:
        """The sample at a position in [0, len)."""
        if not 0 <= index < self._count:
            raise IndexError(f"sample {index} is outside [0, {self._count})")
        start = index * self.seq_len
        tokens = self._shards.read(start, start + self.seq_len + 1)
        if not self._document_mask:
            return Sample(tokens[:-1], tokens[1:])
        ends = self._shards.ends_within(start, start + self.seq_len) - start
        targets = tokens[1:].copy()
        targets[ends - 1] = IGNORED
        return Sample(tokens[:-1], targets, _number_documents(ends, self.seq_len))


def _number_documents(ends: NDArray[np.int64], length: int) -> NDArray[np.int64]:
    """Documents end at `ends` (sorted, in [1, length]) → number of the document at each of `length` positions."""
    documents = np.zeros(length, np.int64)
    documents[ends[ends < length]] = 1
    return np.cumsum(documents)


PACKINGS = ("concat",)


def packed(shards: TokenShards, packing: str, seq_len: int, document_mask: bool, cache: Path) -> Concatenated:
    """The samples that `data.packing` makes of a shard folder."""
    return Concatenated(shards, seq_len, document_mask)
