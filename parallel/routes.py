"""Routes of parts from rank to rank in levels, as `exchange_levels.py` cuts ranks into them. Pure arithmetic; imports no torch.

Levels are travelled one after another. At each hop the place of a part along one level becomes that of its target; along levels
not yet travelled it is still that of its origin. So a rank sends at most n − 1 messages in a hop over a level of n ranks,
however many targets there are. A part for several ranks travels once as long as their places are the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class Hop:
    """The messages of one rank within a level. Both sides of a message list its parts by their numbers, ascending.

    level               number of the level
    send, to            parts, and the place along the level of the rank that gets each, ascending; it may be this one
    receive, came_from  parts, and the place of the rank that sends each, ascending
    """

    level: int
    send: Numbers
    to: Numbers
    receive: Numbers
    came_from: Numbers


def place(ranks: Numbers, levels: Sequence[int], level: int) -> Numbers:
    """Return the places of ranks along a level, counted from 0."""
    return ranks // prod(levels[:level]) % levels[level]


def hops(
    rank: int, levels: Sequence[int], order: Sequence[int], parts: Numbers, origins: Numbers, targets: Numbers
) -> Iterator[Hop]:
    """Yield the hops of a rank.

    rank: its position in the group that is cut into levels; order: of levels, in which they are travelled
    parts, origins, targets: an entry for each target of a part, all of whose origins are the same
    """
    mine = [place(np.asarray(rank), levels, level) for level in range(len(levels))]
    for at, level in enumerate(order):
        begins, ends = place(origins, levels, level), place(targets, levels, level)
        near = np.ones(len(parts), dtype=bool)
        for later in order[at + 1 :]:
            near &= place(origins, levels, later) == mine[later]
        arriving = ends == mine[level]
        send, to = _pairs(parts, ends, near & (begins == mine[level]))
        receive, came_from = _pairs(parts, begins, near & arriving)
        yield Hop(level, send, to, receive, came_from)
        parts, origins, targets = parts[arriving], origins[arriving], targets[arriving]


def _pairs(parts: Numbers, peers: Numbers, chosen: NDArray[np.bool_]) -> tuple[Numbers, Numbers]:
    """Return the chosen parts with their peers, each pair once, by peer and then by part."""
    count = int(parts.max(initial=0)) + 1
    pairs = np.unique(peers[chosen] * count + parts[chosen])
    return pairs % count, pairs // count
