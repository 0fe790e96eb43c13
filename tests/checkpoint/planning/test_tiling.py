"""Ranks write parts that follow from the cuts: every element once, by a rank that holds it, and evenly."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshloom.checkpoint.errors import CheckpointError
from meshloom.checkpoint.planning.columns import pack, unpack
from meshloom.checkpoint.planning.description import Declaration, Description, join
from meshloom.checkpoint.planning.plan import SavePlan
from meshloom.checkpoint.planning.tiling import Tiling, decode_tilings, encode_tilings
from meshloom.parallel.box import Box
from support.checkpoint_worlds import fragments, make_arrays, shares


def declared(name: str, shape: tuple[int, ...], box: Box, dtype: str = "F32") -> Declaration:
    return Declaration(name, "weight", dtype, shape, (), box)


def described(ranks: list[list[Declaration]]) -> Description:
    """The description of all ranks, joined as in a tree: neighbours first, then those."""
    parts = [Description.of(held, rank) for rank, held in enumerate(ranks)]
    while len(parts) > 1:
        parts = [Description.decode(join(parts[at : at + 3]).encode()) for at in range(0, len(parts), 3)]
    return parts[0]


def overlapping(shape: tuple[int, ...], world: int, rng: random.Random) -> list[list[Box]]:
    """Boxes of some rows more than a rank's own on either side, as blocks that lie across a cut are held on both sides."""
    ranks: list[list[Box]] = []
    for boxes in shares(shape, world, rng):
        wider: list[Box] = []
        for box in boxes:
            low, high = max(0, box.offsets[0] - rng.randrange(2)), min(shape[0], box.ends[0] + rng.randrange(2))
            wider.append(Box((low, *box.offsets[1:]), (high - low, *box.shape[1:])))
        ranks.append(wider)
    return ranks


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10**6))
def test_each_element_is_written_once_by_a_rank_that_holds_it(seed: int) -> None:
    rng = random.Random(seed)
    world = rng.randrange(1, 10)
    shapes = [tuple(rng.randrange(1, 9) for _ in range(rng.randrange(1, 4))) for _ in range(3)]
    cut = rng.choice([shares, overlapping])
    boxes = [cut(shape, world, rng) for shape in shapes]
    ranks = [[declared(str(n), shape, box) for n, shape in enumerate(shapes) for box in boxes[n][r]] for r in range(world)]
    plan = SavePlan.of(described(ranks), least=rng.choice([4, 64, 2**20]))
    written = [plan.pieces(rank, held) for rank, held in enumerate(ranks)]
    again = decode_tilings(encode_tilings(plan.tilings))
    for number, shape in enumerate(shapes):
        count = np.zeros(shape, int)
        found: set[tuple[int, Box]] = set()
        for rank, pieces in enumerate(written):
            for piece in pieces:
                held = ranks[rank][piece.source]
                if held.name == str(number):
                    assert held.box.intersect(piece.box) == piece.box, "a rank writes what it does not hold"
                    count[piece.box.slices()] += 1
                    found.add((rank, piece.box))
        assert (count == 1).all()
        array = plan.arrays[f"weight/{number}"]
        assert set(again[array.tiling].parts(4, array.turn)) == found, "a reader looks elsewhere than was written"
        wanted = Box(tuple(rng.randrange(extent) for extent in shape), (1,) * len(shape))
        near = set(again[array.tiling].parts(4, array.turn, wanted))
        assert near == {(rank, box) for rank, box in found if box.intersect(wanted)}


@pytest.mark.parametrize("spoil", ["hole", "outside"])
def test_boxes_that_do_not_make_up_the_array_are_refused(spoil: str) -> None:
    held = [
        [declared("w", (8, 4), Box((0, 0), (4, 4)))],
        [declared("w", (8, 4), Box((4, 0), (3 if spoil == "hole" else 5, 4)))],
    ]
    with pytest.raises(CheckpointError, match=r"weight/w: the boxes that the ranks hold \(\[0:4, 0:4\].*don't make up"):
        SavePlan.of(described(held))


def test_ranks_that_contradict_each_other_are_named() -> None:
    held = [[declared("w", (8,), Box((0,), (8,)))] for _ in range(5)]
    held[4] = [declared("w", (8,), Box((0,), (8,)), "BF16")]
    with pytest.raises(CheckpointError, match=r"weight/w: rank 4 holds it as BF16\[8\], rank 3 as F32\[8\]"):
        described(held)


@pytest.mark.parametrize("world", [2, 7, 64])
def test_copies_share_the_writing_evenly(world: int) -> None:
    sizes = [(4096, 1024), (1024,), (512, 700), (3, 5)] * 24  # 16 MiB, 4 KiB, 1.4 MiB, 60 bytes
    held = [declared(f"w{n}", shape, Box.whole(shape)) for n, shape in enumerate(sizes)]
    plan = SavePlan.of(described([held] * world))
    written = [sum(piece.box.numel * 4 for piece in plan.pieces(rank, held)) for rank in range(world)]
    assert sum(written) == plan.bytes
    assert max(written) <= 1.15 * plan.bytes / world + 2**21


def test_cuts_of_many_ranks_are_proved_and_packed_small() -> None:
    ranks, rows, columns = 16384, 8 * 2048, 8 * 512
    number = np.arange(ranks)
    offsets = np.stack([number // 8 * 8, number % 8 * 512], 1)
    shapes = np.broadcast_to([8, 512], (ranks, 2))
    tiling = Tiling.of((rows, columns), number, offsets, shapes)
    assert len(tiling) == ranks and tiling.fault((rows, columns)) is None
    assert list(tiling.parts(4, 0, Box((12, 700), (1, 1)))) == [(9, Box((8, 512), (8, 512)))]
    assert sum(len(str(value)) for value in encode_tilings([tiling]).values()) < 10_000
    shifted = offsets[:256].copy()
    shifted[77, 0] += 8
    with pytest.raises(ValueError, match="don't make up the array: 4096 of"):
        Tiling.of((256, columns), number[:256], shifted, shapes[:256])


def test_columns_of_integers_come_back() -> None:
    for values in ([], [5], [2**40, -3, 0], list(range(1000))):
        assert unpack(pack(values)).tolist() == values
    with pytest.raises(ValueError, match=r"damaged|base64|padding"):
        unpack("no column")


def test_parts_on_ranks_of_a_stage_are_joined_by_name() -> None:
    ranks = fragments(make_arrays(), 4, 3)
    held = [[Declaration(f.name, f.role, "F32", f.global_shape, (), f.box) for f in rank] for rank in ranks]
    held[1] = [each for each in held[1] if each.name != "experts.w" or each.box == Box.whole(each.shape)]
    plan = described(held)
    assert [entry.key for entry in plan.entries] == sorted({each.key for rank in held for each in rank})
    rows = {(e.key, int(r)) for e in plan.entries for r in plan.holdings[e.cut].ranks}
    assert rows == {(each.key, rank) for rank, one in enumerate(held) for each in one}
