"""Lengths of documents: how many there are of each, and where most tokens are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...config.lazy import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class LengthClass:
    """Documents of up to `longest` tokens, and longer than those of the class before.

    documents, tokens  how many, and the tokens of all of them
    """

    longest: int
    documents: int
    tokens: int


def length_histogram(lengths: Sequence[int] | NDArray[np.int64]) -> list[LengthClass]:
    """Count documents and their tokens by powers of two, from the class of the shortest to that of the longest."""
    if not len(lengths):
        return []
    n = np.asarray(lengths, np.int64)
    power = np.ceil(np.log2(np.maximum(n, 1))).astype(np.int64)
    documents = np.bincount(power)
    tokens = np.bincount(power, weights=n)
    first = int(power.min())
    return [LengthClass(1 << at, int(documents[at]), round(float(tokens[at]))) for at in range(first, len(documents))]


def token_median(lengths: Sequence[int] | NDArray[np.int64]) -> int:
    """Return the length of the document that the median token is in: half of all tokens lie in documents as long or longer."""
    n = np.sort(np.asarray(lengths, np.int64))
    sums = np.cumsum(n)
    return int(n[np.searchsorted(sums, sums[-1] / 2)])


def describe_lengths(lengths: Sequence[int] | NDArray[np.int64]) -> str:
    """Say in one line how long documents are."""
    n = np.asarray(lengths, np.int64)
    return (
        f"{len(n):,} documents of {int(n.sum()):,} tokens: the median has {int(np.median(n)):,}, half of all tokens"
        f" lie in documents of {token_median(lengths):,} or more, and the longest has {int(n.max()):,}"
    )
