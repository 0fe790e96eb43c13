"""Five distributions of document lengths, each a short table of quantiles, for simulations of long-tailed corpora.

`magi` has the quantiles of MagiAttention's published histogram of some 13.5 million documents. Of the others only curves and a
few figures are published, and their tables are fitted to these by eye: ByteScale's "Byted" (80 % of documents up to 4K tokens,
0.05 % of 2M and more) and its GitHub; FlexSP's CommonCrawl and Wikipedia (more than 90 % below 8K). Between two quantiles the
logarithm of the length is interpolated.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from itertools import pairwise
from random import Random

import numpy as np

from meshloom.data.samples.packing import best_fit

K = 1024
QUANTILES: dict[str, list[tuple[float, int]]] = {
    "magi": [
        *((0.0, 1), (0.0022, 10), (0.0313, 50), (0.0833, 100), (0.1856, 200), (0.4675, 500), (0.7138, K), (0.8703, 2 * K)),
        *((0.9437, 4 * K), (0.9742, 8 * K), (0.9871, 16 * K), (0.9956, 32 * K), (0.9970, 64 * K), (0.9986, 128 * K)),
        (1.0, 192 * K),
    ],
    "byted": [(0.0, 16), (0.5, 1200), (0.8, 4 * K), (0.95, 24 * K), (0.99, 128 * K), (0.9995, 2048 * K), (1.0, 4096 * K)],
    "github": [(0.0, 16), (0.5, 1000), (0.9, 7000), (0.99, 60_000), (0.999, 400_000), (1.0, 2048 * K)],
    "commoncrawl": [(0.0, 16), (0.5, 700), (0.9, 3000), (0.99, 12_000), (0.999, 60_000), (1.0, 300_000)],
    "wikipedia": [(0.0, 16), (0.5, 300), (0.9, 2000), (0.99, 9000), (0.999, 30_000), (1.0, 128 * K)],
}


def draw_length(name: str, random: Random) -> int:
    """Draw a document's length in tokens."""
    table = QUANTILES[name]
    share = random.random()
    (low, shortest), (high, longest) = table[bisect_right(table, share, key=lambda entry: entry[0]) - 1 :][:2]
    place = (share - low) / (high - low)
    return round(math.exp(math.log(shortest) + place * math.log(longest / shortest)))


def pack_rows(name: str, length: int, count: int, random: Random) -> list[list[int]]:
    """Draw documents for about `count` rows of `length` and pack them by best fit, as `data.packing=bestfit` does.

    Returns each row's lengths; what is left of a row is its last document, of padding.
    """
    pieces: list[int] = []
    room = count * length
    while room > 0:
        document = draw_length(name, random)
        pieces += [length] * (document // length) + [document % length] * (document % length > 0)
        room -= document
    lengths = np.array(pieces)
    order, bins = best_fit(lengths, length)
    rows = [lengths[order[start:stop]].tolist() for start, stop in pairwise(bins.tolist())]
    return [row + [length - sum(row)] * (sum(row) < length) for row in rows]
