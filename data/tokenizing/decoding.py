"""Text of tokens that go on from others."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_SEEN = 16  # tokens before, at most: enough for any character and any word's space
_BROKEN = "\ufffd"


def decode_behind(decode: Callable[[Sequence[int]], str], before: Sequence[int], tokens: Sequence[int]) -> str:
    """Return the text that tokens add to those before them.

    A tokenizer of SentencePiece's kind writes no space at the beginning of a text, so tokens decoded alone would lose theirs.
    A character that the tokens before have begun belongs to these.
    """
    seen = before[-_SEEN:]
    whole, known = decode([*seen, *tokens]), decode(seen)
    while known and not whole.startswith(known):
        if not known.endswith(_BROKEN):
            return decode(tokens)
        known = known[:-1]
    return whole[len(known) :]
