"""Levels of the gradient exchange: no block spans two hosts, everybody is reached, and messages stay few."""

from __future__ import annotations

from itertools import product
from math import prod, sqrt

import pytest

from meshloom.parallel.config import GRADIENT_EXCHANGES
from meshloom.parallel.exchange_levels import PEERS, block_size, exchange_levels, members, messages


def hosts(size: int, per_host: int, stride: int = 1) -> list[int]:
    return [rank * stride // per_host for rank in range(size)]


@pytest.mark.parametrize(
    ("places", "kind", "levels"),
    [
        (hosts(8, 8), "hierarchical", (8,)),  # one host
        (hosts(16, 8), "auto", (8, 2)),
        (hosts(16, 8), "direct", (16,)),
        (hosts(16, 8, stride=4), "auto", (2, 8)),  # tp 4: half as many sums, at most twice as wide
        (hosts(64, 2), "auto", (2, 32)),
        (hosts(4096, 8), "auto", (8, 32, 16)),
        (hosts(512, 8, stride=8), "auto", (32, 16)),  # tp 8: each rank of the group on a host of its own
        (hosts(32, 8, stride=8), "auto", (32,)),
        (hosts(6, 1), "hierarchical", (3, 2)),
        (hosts(12, 8), "auto", (4, 3)),  # a host of eight ranks and one of four
        (hosts(7, 1), "hierarchical", (7,)),
        ([rank % 8 for rank in range(64)], "auto", (64,)),  # ranks dealt to hosts in turns
        ([rank // 2 % 4 for rank in range(16)], "hierarchical", (16,)),  # two at a time
    ],
)
def test_levels_follow_hosts_and_size(places: list[int], kind: str, levels: tuple[int, ...]) -> None:
    assert exchange_levels(places, kind) == levels


def test_no_block_spans_hosts_and_rows_reach_every_rank() -> None:
    for size, per_host, kind in product((2, 6, 8, 12, 24), (1, 2, 3, 4, 8), GRADIENT_EXCHANGES):
        places = hosts(size, per_host)
        levels = exchange_levels(places, kind)
        assert prod(levels) == size
        groups = [members(position, levels) for position in range(size)]
        for position in range(size):
            assert all(position in group for group in groups[position])
            assert all(groups[other][at] == group for at, group in enumerate(groups[position]) for other in group)
            if len(levels) > 1 and block_size(places) > 1:
                assert len({places[other] for other in groups[position][0]}) == 1
            reached = {position}
            for at in range(len(levels)):
                reached = {other for each in reached for other in groups[each][at]}
            assert reached == set(range(size))


@pytest.mark.parametrize("per_host", [1, 4, 8])
def test_messages_grow_with_the_root_of_the_ranks(per_host: int) -> None:
    for size in (2**power for power in range(4, 15)):
        levels = exchange_levels(hosts(size, per_host), "auto")
        assert messages(levels) <= 2 * sqrt(size) + PEERS
    assert messages(exchange_levels(hosts(16384, per_host), "direct")) == 16383
