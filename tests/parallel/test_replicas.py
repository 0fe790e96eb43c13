"""Copies on several ranks: what counts as one, what a flipped bit does to the hash, and who is named."""

from __future__ import annotations

import pytest
import torch

from meshloom.parallel.config import ParallelConfig
from meshloom.parallel.replicas import Replicas, hash_tensor
from support.parity import Work, build, take_steps
from support.ranks import run_ranks

MASK = 2**64 - 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.uint8])
def test_every_flipped_bit_and_every_exchange_changes_the_hash(dtype: torch.dtype) -> None:
    tensor = torch.arange(24).to(dtype)
    before = int(hash_tensor(tensor))
    for element in range(24):
        for bit in range(8 * tensor.element_size()):
            flipped = tensor.clone()
            flipped.view(torch.uint8).view(-1)[element * tensor.element_size() + bit // 8] ^= 1 << bit % 8
            assert int(hash_tensor(flipped)) != before, (element, bit)
    for one, two in ((0, 1), (3, 20), (8, 16)):
        moved = tensor.clone()
        moved[[one, two]] = tensor[[two, one]]
        assert int(hash_tensor(moved)) != before


def test_the_hash_is_the_sum_of_words_times_their_odd_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    from meshloom.parallel import replicas

    monkeypatch.setattr(replicas, "BLOCK", 4)
    monkeypatch.setattr(replicas, "SMALL", 2)
    monkeypatch.setattr(replicas, "_numbers", {})
    numbers = [int(n) for n in replicas._position_numbers(4)]  # pyright: ignore[reportPrivateUsage]
    assert all(number % 2 for number in numbers)
    words = [3, -5, 2**62, 7, 11, -(2**63)]
    expected = 0
    for begin in (0, 4):
        part = sum(word * number for word, number in zip(words[begin : begin + 4], numbers, strict=False))
        expected = (expected * 0x2545F4914F6CDD1D + part) & MASK
    assert int(hash_tensor(torch.tensor(words))) & MASK == expected


def test_a_view_that_begins_off_a_word_has_a_hash() -> None:
    whole = torch.arange(9, dtype=torch.bfloat16)
    assert int(hash_tensor(whole[1:5])) != int(hash_tensor(whole[2:6]))
    assert int(hash_tensor(torch.empty(0))) == 0


Found = tuple[int, float, int, list[tuple[tuple[int, ...], tuple[int, ...], tuple[str, ...], int]]]


def compared(rank: int, world_size: int, parallel: ParallelConfig, flipped: int | None) -> Found:
    """Sets of holders, the share of copies, and how many differ after two steps; with a bit flipped on a rank, who does."""
    work = Work(parallel, samples=8)
    engine = build(work, world_size)
    take_steps(engine, work, range(2))
    fragments = list(engine.fragments())
    replicas = Replicas(engine.mesh, fragments)
    if rank == flipped:
        chosen = next(each for each in fragments if each.role == "exp_avg" and each.tensor.numel() > 1)
        chosen.tensor.view(-1)[1:2].view(torch.int64).bitwise_xor_(1 << 40)
    table = replicas.table()
    differing = int(replicas.differing(table))
    found = replicas.disagreements(table.tolist()) if differing else []
    return (
        len(replicas.sets),
        replicas.copied / replicas.elements,
        differing,
        [(each.holders, each.odd, each.arrays, each.element) for each in found],
    )


LAYOUTS = {
    "zero 0": (3, ParallelConfig(zero=0), 1, 1.0),
    "zero 1": (2, ParallelConfig(zero=1), 0, 0.0),
    "HSDP, zero 3": (4, ParallelConfig(zero=3, replicate=2), 2, 1.0),
    "HSDP, zero 1": (4, ParallelConfig(zero=1, replicate=2), 2, 1.0),
    "tp 2 × zero 0": (4, ParallelConfig(tp=2, zero=0), 2, 1.0),
    "pp 2 × zero 0": (4, ParallelConfig(pp=2, zero=0), 2, 1.0),
    "cp 2, zero 0": (2, ParallelConfig(cp=2, zero=0), 1, 1.0),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_copies_agree_bit_for_bit_on_every_layout(layout: str) -> None:
    ranks, parallel, sets, share = LAYOUTS[layout]
    for found in run_ranks(ranks, compared, parallel, None):
        assert found == (sets, share, 0, [])


def test_of_three_the_odd_rank_is_named_with_its_array() -> None:
    for _, _, differing, found in run_ranks(3, compared, ParallelConfig(zero=0), 0):
        assert differing == 2  # from rank 0, which is the odd one
        ((holders, odd, arrays, element),) = found
        assert (holders, odd, element) == ((0, 1, 2), (0,), 1)
        assert len(arrays) == 1 and arrays[0].startswith("exp_avg/")


def test_of_two_both_are_named() -> None:
    for _, _, differing, found in run_ranks(4, compared, ParallelConfig(zero=3, replicate=2), 3):
        assert differing == 1
        ((holders, odd, _, _),) = found
        assert holders == odd and 3 in holders and len(holders) == 2


def looked_up(rank: int, world_size: int) -> tuple[int, int, int]:
    """Count the values that holders of a part have, of a part that another layout made, and of holders of a larger world."""
    replicas = Replicas((engine := build(Work(ParallelConfig(zero=0), samples=4), world_size)).mesh, engine.fragments())
    part = next(iter(engine.fragments()))
    box = (tuple(part.box.offsets), tuple(part.box.shape))
    other = (box[0], tuple(2 * size for size in box[1]))
    asked = ((0, 1), box, 0), ((0, 1), other, 10**9), ((0, world_size), box, 0)
    first, second, third = (len(replicas.values(held, part.key, where, element)) for held, where, element in asked)
    return first, second, third


def test_a_part_that_another_layout_made_has_no_values() -> None:
    assert run_ranks(2, looked_up) == [(2, 0, 0)] * 2


def healed(rank: int, world_size: int) -> tuple[tuple[int, ...], int | None, tuple[float, ...]]:
    """Return the rank that is named, and the element, where a weight had another bit only when it was hashed."""
    replicas = Replicas((engine := build(Work(ParallelConfig(zero=0), samples=4), world_size)).mesh, engine.fragments())
    words = next(iter(engine.fragments())).tensor.view(-1)[1:2].view(torch.int64)
    words ^= int(rank == 1)
    table = replicas.table()
    words ^= int(rank == 1)
    (found,) = replicas.disagreements(table.tolist())
    return found.odd, found.element, found.values


def test_a_difference_that_the_next_update_has_rounded_away_is_still_told() -> None:
    assert run_ranks(2, healed) == [((0, 1), None, ())] * 2
