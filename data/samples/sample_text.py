"""Samples as text: what the model reads, which of it belongs together, and which of it carries loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from ...config.lazy import numpy as np
from ..batch import IGNORED, Sample
from ..tokenizing.decoding import decode_behind
from ..tokenizing.tokenizer import Tokenizer

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class SampleSpan:
    """Positions [start, stop) of a sample that are alike, as text.

    document  number in the sample, from 0; 0 throughout where attention crosses documents
    learned   whether the model is trained to predict these tokens; the first of a sample never is
    """

    text: str
    start: int
    stop: int
    document: int
    learned: bool


def padding_of(sample: Sample, end_of_document: int | None) -> int:
    """Return how many positions at the end of a sample are padding: ends of documents that nothing predicts or follows."""
    fill = 0 if end_of_document is None else end_of_document
    idle = (sample.tokens == fill) & (sample.targets == IGNORED) & ~learned_positions(sample)
    used = np.flatnonzero(~idle)
    return len(sample.tokens) - (int(used[-1]) + 1 if len(used) else 0)


def learned_positions(sample: Sample) -> NDArray[np.bool_]:
    """Return whether the token at each position is a target of the position before it, (seq_len,)."""
    return np.concatenate([[False], sample.targets[:-1] != IGNORED])


def sample_spans(sample: Sample, tokenizer: Tokenizer | None) -> list[SampleSpan]:
    """Return a sample's spans in order, without the padding at its end. Tokens without a tokenizer are shown as numbers."""
    end = None if tokenizer is None else tokenizer.end_of_document
    used = len(sample.tokens) - padding_of(sample, end)
    if not used:
        return []
    learned = learned_positions(sample)[:used]
    documents = np.zeros(used, np.int64) if sample.documents is None else sample.documents[:used]
    changes = np.flatnonzero((np.diff(learned.astype(np.int8)) != 0) | (np.diff(documents) != 0)) + 1
    borders, tokens = [0, *changes.tolist(), used], sample.tokens.tolist()
    return [
        SampleSpan(
            _text(tokens, _begin(documents, start), start, stop, tokenizer),
            start,
            stop,
            int(documents[start]),
            bool(learned[start]),
        )
        for start, stop in pairwise(borders)
    ]


def _begin(documents: NDArray[np.int64], position: int) -> int:
    """Return where the document at a position begins in the sample."""
    return int(np.searchsorted(documents, documents[position]))


def _text(tokens: Sequence[int], begin: int, start: int, stop: int, tokenizer: Tokenizer | None) -> str:
    """Return the text of tokens [start, stop) of a document that begins at `begin`."""
    if tokenizer is None:
        return " ".join(map(str, tokens[start:stop]))
    return "".join(_pieces(tokens, begin, start, stop, tokenizer))


def _pieces(tokens: Sequence[int], begin: int, start: int, stop: int, tokenizer: Tokenizer) -> Iterator[str]:
    """Yield the text of tokens [start, stop), with the names of ends of documents, which have no text."""
    end = tokenizer.end_of_document
    while start < stop:
        at = next((at for at in range(start, stop) if tokens[at] == end), stop)
        if at > start:
            yield decode_behind(tokenizer.decode, tokens[begin:start], tokens[start:at])
        if at < stop:
            yield tokenizer.name_of(end)
        start = begin = at + 1
