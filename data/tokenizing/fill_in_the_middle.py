"""Fill-in-the-middle (Bavarian et al., arXiv 2207.14255): some documents are cut in three, and the middle comes last.

    PSM   <prefix> prefix <suffix> suffix <middle> middle       the tokenizer's own three tokens stand between
    SPM   <prefix> <suffix> suffix <middle> prefix middle       the paper's second variant

Which document is cut, where and into which order is a function of the seed and the document's number in its source (R1). Cuts
lie between characters, as in the paper. A document keeps its cut in every epoch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...config.hashing import hash64
from ...config.lazy import numpy as np
from ...config.problems import Problem

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .tokenizer import Tokenizer

NAMES = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<\uff5cfim\u2581begin\uff5c>", "<\uff5cfim\u2581hole\uff5c>", "<\uff5cfim\u2581end\uff5c>"),  # DeepSeek's
)
"""Names of the prefix, suffix and middle tokens in well-known tokenizers; a trained one is given the first."""


@dataclass(frozen=True)
class FillInTheMiddle:
    """The transform of a source.

    rate      share of the documents that are cut
    spm_rate  share of these that are written suffix first
    seed      of the data
    """

    rate: float
    spm_rate: float
    seed: int

    def problems(self, key: str) -> list[Problem]:
        """Return what is wrong with the shares. key: the config node's."""
        shares = {"fim_rate": self.rate, "fim_spm_rate": self.spm_rate}
        return [
            Problem(f"{key}.{name}", f"{share} is no share", "use a number from 0 to 1")
            for name, share in shares.items()
            if not 0 <= share <= 1
        ]

    def tokenizer_problems(self, tokenizer: Tokenizer, key: str) -> list[Problem]:
        """Return what keeps a tokenizer from marking the parts. key: the config node's."""
        if tokenizer.fill_in_the_middle is not None:
            return []
        known = "; ".join(", ".join(names) for names in NAMES)
        fix = f"use 0, or a tokenizer with the prefix, suffix and middle tokens of one of these: {known}"
        return [Problem(f"{key}.fim_rate", "the tokenizer has no tokens of fill-in-the-middle", fix)]

    def cut(self, number: int, text: str) -> tuple[str, str, str, bool] | None:
        """Return prefix, middle and suffix of a document, and whether the suffix comes first; None: it stays as it is."""
        draws = [hash64(self.seed, number, draw) / 2.0**64 for draw in range(4)]
        if draws[0] >= self.rate:
            return None
        first, last = sorted(int(draw * (len(text) + 1)) for draw in draws[1:3])
        return text[:first], text[first:last], text[last:], draws[3] < self.spm_rate

    def encode(self, tokenizer: Tokenizer, first: int, texts: Sequence[str]) -> list[NDArray[np.int64]]:
        """Encode documents as `Tokenizer.encode_documents` does, those that are cut in their new order.

        first: number of the first of them in its source
        """
        names = tokenizer.fill_in_the_middle
        assert names is not None, "tokenizer_problems says so"
        prefix_token, suffix_token, middle_token = (np.array([each], np.int64) for each in names)
        cuts = [self.cut(first + place, text) for place, text in enumerate(texts)]
        written: list[str] = []
        for text, cut in zip(texts, cuts, strict=True):
            # In SPM prefix and middle are one text: no token may end between them.
            written += [text] if cut is None else [cut[2], cut[0] + cut[1]] if cut[3] else [cut[0], cut[2], cut[1]]
        encoded = iter(tokenizer.encode_documents(written))
        found: list[NDArray[np.int64]] = []
        for cut in cuts:
            if cut is None:
                found.append(next(encoded))
                continue
            if cut[3]:
                suffix, middle = next(encoded)[:-1], next(encoded)
                parts = [prefix_token, suffix_token, suffix, middle_token, middle]
            else:
                prefix, suffix, middle = next(encoded)[:-1], next(encoded)[:-1], next(encoded)
                parts = [prefix_token, prefix, suffix_token, suffix, middle_token, middle]
            found.append(np.concatenate(parts))
        return found
