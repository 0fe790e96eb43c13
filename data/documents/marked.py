"""Text of which only some spans are learned: an answer behind its prompt, the assistant's turns of a chat."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from ...config.lazy import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


class MarkedText(str):
    """A document with a loss mask. To everything that takes text it is text.

    learned   [start, stop) of the characters whose tokens carry loss, in order
    specials  names of special tokens in the text (`<|im_start|>`) stand for these tokens, as a chat template means them
    """

    learned: tuple[tuple[int, int], ...]
    specials: bool

    def __new__(cls, text: str, learned: Iterable[tuple[int, int]], *, specials: bool = False) -> MarkedText:
        """Mark a text."""
        made = super().__new__(cls, text)
        made.learned = tuple(learned)
        made.specials = specials
        return made


def learned_tokens(text: MarkedText, offsets: Sequence[tuple[int, int]]) -> NDArray[np.bool_]:
    """Return which tokens carry loss, (tokens + 1,): those that end inside a span, and the end of the document behind one.

    offsets: [start, stop) of each token's characters
    """
    stops = np.array([stop for _, stop in offsets], np.int64)
    found = np.zeros(len(offsets) + 1, np.bool_)
    if text.learned:
        starts, ends = np.array(text.learned, np.int64).T
        span = np.searchsorted(ends, stops)  # the first that does not end before the token
        inside = span < len(ends)
        found[:-1][inside] = starts[span[inside]] < stops[inside]
    found[-1] = bool(text.learned) and text.learned[-1][1] == len(text)
    return found
