"""Write a corpus whose documents have the lengths of a long-tailed distribution (`document_lengths.py`), to try runs with.

    python benchmarks/long_tail_corpus.py lengths=magi tokens=20000000 output=corpus.jsonl
    meshloom train data=jsonl data.input=corpus.jsonl data.tokenizer=bytes data.document_mask=true data.packing=bestfit …

A document is random words. Its length is in bytes, which are the tokens of data.tokenizer=bytes, its end
among them. Prints how many documents there are of each length.
"""

# pyright: basic, reportMissingImports=false

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from random import Random

from arguments import read
from document_lengths import QUANTILES, draw_length

from meshloom.data.documents.lengths import describe_lengths, length_histogram

LETTERS = "etaoinshrdlu"


@dataclass
class Settings:
    """tokens: of all documents, about; longest: a document has no more; 0: any."""

    lengths: str = "magi"
    tokens: int = 20_000_000
    longest: int = 0
    seed: int = 0
    output: str = "corpus.jsonl"


def text_of(length: int, random: Random) -> str:
    """Random words of `length` characters in all."""
    words: list[str] = []
    room = length
    while room > 0:
        word = "".join(random.choices(LETTERS, k=min(room, random.randrange(2, 9))))
        words.append(word)
        room -= len(word) + 1
    return " ".join(words)[:length].ljust(length, "e")


def main(settings: Settings) -> None:
    """Write the corpus."""
    if settings.lengths not in QUANTILES:
        raise SystemExit(f"lengths={settings.lengths} is none of {', '.join(QUANTILES)}")
    random = Random(settings.seed)
    lengths: list[int] = []
    room = settings.tokens
    with Path(settings.output).open("w", encoding="utf-8") as file:
        while room > 0:
            length = max(2, draw_length(settings.lengths, random))
            length = min(length, settings.longest) if settings.longest else length
            file.write(json.dumps({"text": text_of(length - 1, random)}) + "\n")
            lengths.append(length)
            room -= length
    print(describe_lengths(lengths))
    for each in length_histogram(lengths):
        share = each.tokens / sum(lengths)
        print(f"up to {each.longest:>9,}: {each.documents:>9,} documents, {share:6.1%} of the tokens {'▇' * round(50 * share)}")


if __name__ == "__main__":
    main(read(Settings(), sys.argv[1:]))
