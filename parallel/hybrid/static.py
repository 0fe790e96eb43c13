"""Deal documents as a mesh of data × context ranks does: what the greedy plans are compared with."""

from __future__ import annotations

from collections.abc import Sequence

from .assignment import HybridAssignment, Row, Shared
from .cost import CostModel
from .greedy import pack_rows


def static(lengths: Sequence[int], ranks: int, capacity: int, costs: CostModel) -> HybridAssignment:
    """Pack rows for as many ranks as the longest document needs, a divisor of all, and deal them in turn to such groups."""
    needed = -(-max(lengths, default=1) // capacity)
    group = next(n for n in range(needed, ranks + 1) if ranks % n == 0)
    shared: list[tuple[Shared, int]] = []
    for number, documents in enumerate(pack_rows(range(len(lengths)), lengths, group * capacity)):
        turn, place = divmod(number, ranks // group)
        shared += [(Shared(document, place * group, group, turn), number) for document in documents]
    shared.sort(key=lambda each: each[0].wave)
    rows: list[dict[int, list[int]]] = [{} for _ in range(ranks)]
    for at, (each, number) in enumerate(shared):
        for rank in each.members(ranks):
            rows[rank].setdefault(number, []).append(at if group > 1 else each.document)
    made = [[Row(tuple(held)) if group > 1 else Row((), tuple(held)) for held in of_rank.values()] for of_rank in rows]
    return HybridAssignment(tuple(map(tuple, made)), tuple(each for each, _ in shared) if group > 1 else ())
