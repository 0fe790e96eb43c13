"""Rows of packed documents on random tokens, the same for every system that `packed_documents.py` compares.

A document's last token is `END`, by which torchtitan finds its end; no other token is. Every position carries loss.
"""

# pyright: basic, reportMissingImports=false

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from random import Random

import numpy as np
import torch
from document_lengths import draw_length
from numpy.typing import NDArray

from meshloom.data.batch import MicroBatch, Sample
from meshloom.data.samples.packing import best_fit
from meshloom.kernels.documents import Documents

END = 0


def draw_rows(name: str, length: int, count: int, longest: int, seed: int = 0) -> list[list[int]]:
    """Draw documents of a distribution, cut where they are longer than `longest`, and pack them into rows by best fit.

    Returns the lengths in each of the first `count` rows; what is left of a row is cut likewise.
    """
    random = Random(f"{name} {seed}")
    pieces: list[int] = []
    room = (count + 1) * length
    while room > 0:
        document = draw_length(name, random)
        room -= document
        pieces += _cut(document, min(longest, length))
    lengths = np.array(pieces)
    order, bins = best_fit(lengths, length)
    rows = [lengths[order[start:stop]].tolist() for start, stop in pairwise(bins.tolist())]
    Random(seed).shuffle(rows)  # best fit leaves the longest documents first
    return [row + _cut(length - sum(row), min(longest, length)) for row in rows[:count]]


def _cut(document: int, longest: int) -> list[int]:
    """Cut a document into pieces of at most `longest` tokens."""
    return [longest] * (document // longest) + [document % longest] * (document % longest > 0)


def tokens_of(row: Sequence[int], vocabulary: int, seed: int) -> NDArray[np.int64]:
    """Return one token more than the row has positions."""
    tokens = np.random.default_rng(seed).integers(1, vocabulary, sum(row) + 1)
    tokens[np.cumsum(row) - 1] = END
    return tokens


def micro_batch(rows: Sequence[Sequence[int]], vocabulary: int, seed: int) -> MicroBatch:
    """Make a micro-batch of rows of one length."""
    drawn = [torch.from_numpy(tokens_of(row, vocabulary, seed + number)) for number, row in enumerate(rows)]
    tokens = torch.stack(drawn)
    ids = [torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in rows]
    return MicroBatch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), Documents.of(torch.stack(ids)))


class PackedSamples:
    """The same rows as samples. Implements `Samples` and `SamplesInParts`."""

    def __init__(self, rows: Sequence[Sequence[int]], vocabulary: int) -> None:
        self._rows, self.vocabulary = rows, vocabulary
        self.seq_len = sum(rows[0])

    def lengths(self, index: int) -> NDArray[np.int64]:
        """Return the lengths of a row's documents."""
        return np.array(self._rows[index], np.int64)

    def part(self, index: int, start: int, stop: int) -> Sample:
        """Return the tokens and targets of positions [start, stop) of a row."""
        return self[index].part(start, stop)

    def __getitem__(self, index: int) -> Sample:
        tokens = tokens_of(self._rows[index], self.vocabulary, index)
        return Sample(tokens[:-1], tokens[1:], np.repeat(np.arange(len(self._rows[index])), self._rows[index]))
