"""Levels of the gradient exchange: within each host first, then the sums between hosts. Pure arithmetic; imports no torch.

Ranks that share weights (`masters.py`) each sum the rows of the gradient that they update. Exchanged directly, each of n ranks
sends n − 1 messages, and rows cross the network once for every rank of a host. In levels, the ranks of a host first sum what
they have for each other rank of their number in other hosts, and only these sums go on. Of n ranks in levels of n₁ × n₂ × …,
each sends Σ (nᵢ − 1) messages. With L ranks a host, 1/L as many elements cross the network. A sum is at most twice as wide as a
gradient (fp32 and bf16), so no more bytes cross it where L is two or more.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from math import gcd, isqrt

PEERS = 32
"""Ranks to which one may send directly where nothing else speaks against it: a connection has buffers of its own."""


def block_size(hosts: Sequence[int]) -> int:
    """Return how many ranks the blocks have into which a group can be cut so that none spans two hosts.

    hosts: of each rank of the group, in order
    """
    return gcd(*(len(list(run)) for _, run in groupby(hosts)))


def dealt_in_turns(hosts: Sequence[int]) -> bool:
    """Return whether some host's ranks do not follow each other in the group. hosts: of each rank of the group, in order"""
    return len([host for host, _ in groupby(hosts)]) > len(set(hosts))


def exchange_levels(hosts: Sequence[int], kind: str) -> tuple[int, ...]:
    """Return the size of each level, the innermost first; their product is the group's size.

    Rank p of the group is number p mod n₁ of its innermost block. A number of hosts without suitable factors is one level, and
    so are hosts to which ranks were dealt in turns: blocks of neighbours would cross the network.

    hosts: of each rank of the group, in order; kind: one of GRADIENT_EXCHANGES
    """
    size, here = len(hosts), block_size(hosts)
    if here == size or kind == "direct" or dealt_in_turns(hosts) or (kind == "auto" and here == 1 and size <= PEERS):
        return (size,)
    if here == 1:
        return _in_two(size)
    return (here, *(_in_two(size // here) if size // here > PEERS else (size // here,)))


def _in_two(count: int) -> tuple[int, ...]:
    """Divide a level into two that are as equal as possible. The larger comes first: only there gradients are not widened."""
    smaller = next(each for each in range(isqrt(count), 0, -1) if count % each == 0)
    return (count // smaller, smaller) if smaller > 1 else (count,)


def messages(levels: Sequence[int]) -> int:
    """Return how many messages a rank sends in one exchange."""
    return sum(size - 1 for size in levels)


def describe(levels: Sequence[int], what: str = "gradients (dense) are exchanged") -> str:
    """Describe the exchange in one line, for logs and plans. what: its subject and verb"""
    way = "directly" if len(levels) == 1 else "in levels"
    return f"{what} {way} among {' × '.join(map(str, levels))} ranks: {messages(levels)} messages a rank"


def members(position: int, levels: Sequence[int]) -> list[list[int]]:
    """Return for each level the positions in the whole group with which the rank at a position exchanges, itself included."""
    found: list[list[int]] = []
    stride = 1
    for size in levels:
        first = position - position // stride % size * stride
        found.append(list(range(first, first + size * stride, stride)))
        stride *= size
    return found
