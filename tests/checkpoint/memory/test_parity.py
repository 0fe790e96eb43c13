"""Parity over groups of ranks: what is lost is made again, and groups share as few failure domains as can be."""

from __future__ import annotations

import itertools
import random

import numpy as np

from meshloom.checkpoint.memory.parity import block_bytes, block_of, make_groups, span_of
from meshloom.checkpoint.memory.tier import WITNESSES, choose_witnesses


def test_parity_makes_any_member_again() -> None:
    rng = random.Random(0)
    for count in (2, 3, 4, 7):
        files = [np.frombuffer(rng.randbytes(rng.randrange(0, 5000)), np.uint8) for _ in range(count)]
        files[0] = np.frombuffer(rng.randbytes(4097), np.uint8)
        block = block_bytes([len(file) for file in files])

        def part(member: int, stripe: int, files=files, block=block) -> np.ndarray:
            low, high = span_of(member, stripe, block, len(files[member]))
            return np.pad(files[member][low:high], (0, block - (high - low)))

        parity = [
            np.bitwise_xor.reduce([part(member, stripe) for member in range(count) if member != stripe])
            for stripe in range(count)
        ]
        for lost in range(count):
            blocks: dict[int, np.ndarray] = {}
            for stripe in range(count):
                if stripe != lost:
                    others = [part(member, stripe) for member in range(count) if member not in (lost, stripe)]
                    blocks[block_of(lost, stripe)] = np.bitwise_xor.reduce([parity[stripe], *others])
            again = np.concatenate([blocks[index] for index in range(count - 1)])[: len(files[lost])]
            assert np.array_equal(again, files[lost])


def test_groups_spread_over_failure_domains() -> None:
    for nodes, local, size in itertools.product((1, 2, 3, 4, 8), (1, 2, 4), (2, 4)):
        domains = [f"node{rank // local}" for rank in range(nodes * local)]
        groups = make_groups(domains, size)
        assert sorted(rank for group in groups for rank in group) == list(range(nodes * local))
        if nodes * local > 1:
            assert min(map(len, groups)) >= 2
        if nodes >= size and nodes % size == 0:
            for group in groups:
                assert len({domains[rank] for rank in group}) == len(group), (nodes, local, size, groups)


def test_witnesses_are_few_and_on_every_node() -> None:
    domains = [f"node {rank // 8}" for rank in range(96)]
    groups = make_groups(domains, 2)
    chosen = choose_witnesses(domains, groups)
    assert len(chosen) == WITNESSES and {domains[rank] for rank in chosen} == set(domains)
    assert next(set(group) for group in groups if 0 in group) <= chosen, "two failure domains, whatever happens to one"
    assert choose_witnesses(["a"] * 5, make_groups(["a"] * 5, 2)) == set(range(5)), "all of a small run"
