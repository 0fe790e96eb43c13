"""Parity over groups of ranks: any one member's file can be made again from the others' (REFT, arXiv 2310.12670; RAID 5).

A group of n has n stripes. Member s keeps the parity of stripe s; every other member i gives it one of the n − 1 blocks
that its file is cut into. The parity of a stripe is the XOR of those blocks, so memory grows by 1/(n − 1). For n = 2 the
parity is a copy: a mirror. Files shorter than n − 1 whole blocks count as padded with zeros.
"""

from __future__ import annotations

from collections.abc import Sequence


def block_bytes(sizes: Sequence[int]) -> int:
    """Length of a block in a group whose files have these sizes."""
    return -(-max(sizes) // (len(sizes) - 1))


def block_of(member: int, stripe: int) -> int:
    """Return the index of the block that a member gives to a stripe (`member != stripe`)."""
    assert member != stripe
    return stripe if stripe < member else stripe - 1


def span_of(member: int, stripe: int, block: int, size: int) -> tuple[int, int]:
    """Bytes `[start, stop)` of a member's file that go into a stripe; the rest of the block is zeros."""
    start = block_of(member, stripe) * block
    return min(start, size), min(start + block, size)


def make_groups(domains: Sequence[str], size: int) -> list[list[int]]:
    """Groups of about `size` ranks (at least two, if there are two ranks) that share as few failure domains as can be.

    domains: where each rank runs, such as its host. Each group takes its members from the domains with the most ranks
    left; ranks that are left over at the end join the groups that know their domain least.
    """
    left: dict[str, list[int]] = {}
    for rank, domain in enumerate(domains):
        left.setdefault(domain, []).append(rank)
    groups: list[list[int]] = []
    while sum(map(len, left.values())) >= size:
        group: list[int] = []
        while len(group) < size:
            taken = {domains[rank] for rank in group}
            domain = max(left, key=lambda name: (name not in taken, len(left[name]), name) if left[name] else (False, -1, name))
            group.append(left[domain].pop(0))
        groups.append(sorted(group))
    rest = sorted(rank for ranks in left.values() for rank in ranks)
    if not groups or (len(rest) > 1 and len({domains[rank] for rank in rest}) == len(rest)):
        return [*groups, rest] if rest else groups
    for rank in rest:
        best = min(groups, key=lambda group: (sum(domains[other] == domains[rank] for other in group), len(group)))
        best.append(rank)
    return [sorted(group) for group in groups]
