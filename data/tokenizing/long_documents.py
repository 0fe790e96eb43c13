"""Encode a long document in parts that overlap, with the tokens that encoding it as a whole would give.

A tokenizer needs some hundred bytes of memory per character, so a document of many million characters can't be encoded at
once. Encoding pieces by themselves gives other tokens at each cut: a mark of a word's beginning, a word in two halves.

    part     |------------------------------------------|
    next                                |-------------------------------------------|
    overlap                             |---^-----------|      ^ both agree on a run of tokens: the parts are joined here
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...config.lazy import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from tokenizers import Encoding

OVERLAP = 1 << 13  # characters that two neighbouring parts share
AGREEMENT = 16  # tokens of one place and id on which both parts must agree


@dataclass(frozen=True)
class _EncodedPart:
    """The tokens of a part: their ids, and where each begins and ends in the document."""

    ids: list[int]
    starts: list[int]
    ends: list[int]

    @classmethod
    def of(cls, encoding: Encoding, offset: int) -> _EncodedPart:
        spans = encoding.offsets
        return cls(encoding.ids, [offset + start for start, _ in spans], [offset + end for _, end in spans])

    def token(self, number: int) -> tuple[int, int, int]:
        return self.ids[number], self.starts[number], self.ends[number]


def encode_long(text: str, piece: int, encode: Callable[[str], Encoding]) -> NDArray[np.int64]:
    """Encode a text of more than `piece` characters. Where parts never agree, the text is encoded at once.

    encode: encodes one text, with offsets in characters
    """
    overlap = min(OVERLAP, piece // 2)
    joined: list[NDArray[np.int64]] = []
    part, begin = _EncodedPart.of(encode(text[:piece]), 0), 0
    start = 0
    while start + piece < len(text):
        start += piece - overlap
        following = _EncodedPart.of(encode(text[start : start + piece]), start)
        place = _join(part, following, start, start + overlap)
        if place is None or place[0] < begin:
            return np.array(encode(text).ids, np.int64)
        joined.append(np.array(part.ids[begin : place[0]], np.int64))
        part, begin = following, place[1]
    return np.concatenate([*joined, np.array(part.ids[begin:], np.int64)])


def _join(part: _EncodedPart, following: _EncodedPart, start: int, stop: int) -> tuple[int, int] | None:
    """Find where both parts agree on a run of tokens in the middle of [start, stop): the number of its middle in each."""
    margin = (stop - start) // 4
    here = bisect_left(part.starts, start + margin)
    there = {following.token(number): number for number in range(bisect_left(following.starts, stop))}
    run = 0
    for number in range(here, bisect_left(part.ends, stop - margin)):
        other = there.get(part.token(number))
        agrees = other is not None and run and there.get(part.token(number - 1)) == other - 1
        run = run + 1 if agrees else int(other is not None)
        if other is not None and run == AGREEMENT:
            back = AGREEMENT // 2
            return number - back, other - back
    return None
