"""Simulate how evenly a ring's members share packed rows: a zig-zag of the whole row beside one of each document.

    python benchmarks/ring_balance.py [rows=40]

For each distribution of document lengths, row and number of ranks it prints the time of the slowest members over the mean, of
all rows. A member's time is its score entries and its positions; both cost as much in a document of 45.6K tokens (a model like
Llama 8B). Also printed: the documents of a row, those of them that are cut, and the milliseconds of dealing a row. No messages
are charged.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from random import Random

from arguments import read
from document_lengths import QUANTILES, pack_rows

from meshloom.parallel.context.zigzag import deal_pieces

ENTRIES_PER_POSITION = 45_600 / 2


@dataclass
class Settings:
    """The simulated rows: so many of each kind."""

    rows: int = 40


def entries(start: int, stop: int) -> int:
    """Count score entries of positions [start, stop) of a document."""
    return (stop * (stop + 1) - start * (start + 1)) // 2


def row_zigzag(cu_seqlens: Sequence[int], size: int) -> list[int]:
    """Count score entries of members that hold parts i and 2N − 1 − i of a row."""
    length, found = cu_seqlens[-1], [0] * size
    for part in range(2 * size):
        start, stop = part * length // (2 * size), (part + 1) * length // (2 * size)
        for first, end in pairwise(cu_seqlens):
            if first < stop and start < end:
                found[min(part, 2 * size - 1 - part)] += entries(max(start, first) - first, min(stop, end) - first)
    return found


def simulate(name: str, length: int, size: int, count: int) -> str:
    """Return one line of the table."""
    rows = pack_rows(name, length, count, Random(size))
    before = after = ideal = seconds = 0.0
    documents = cut = 0
    for row in rows:
        cu_seqlens = tuple(accumulate(row, initial=0))
        began = time.perf_counter()
        dealt = deal_pieces(cu_seqlens, length, size)
        seconds += time.perf_counter() - began
        offsets = [[(p.start - cu_seqlens[p.document], p.length) for p in pieces] for pieces in dealt]
        own = [sum(entries(start, start + part) for start, part in pieces) for pieces in offsets]
        positions = ENTRIES_PER_POSITION * length / size
        ideal += positions + sum(own) / size
        before += positions + max(row_zigzag(cu_seqlens, size))
        after += positions + max(own)
        documents += len(row)
        cut += len(row) - sum(p.length == row[p.document] for pieces in dealt for p in pieces)
    n = len(rows)
    figures = f"{before / ideal:.3f} | {after / ideal:.3f} | {documents / n:.0f} | {cut / n:.1f} | {seconds / n * 1e3:.1f}"
    return f"| {name} | {length // 1024}K | {size} | {figures} |"


def main(settings: Settings) -> None:
    """Print the table."""
    print("| Lengths | Row | Ranks | Zig-zag of rows | Zig-zag of documents | Documents | Cut | ms |")
    print("|---" * 8 + "|")
    for name in QUANTILES:
        for length in (32 * 1024, 128 * 1024):
            for size in (2, 4, 8, 64):
                print(simulate(name, length, size, settings.rows), flush=True)


if __name__ == "__main__":
    main(read(Settings(), sys.argv[1:]))
