"""Arrays whose shape and cut are their own: overlapping parts, whole arrays on one rank, split points."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meshloom.checkpoint.checkpointer import Checkpointer
from meshloom.checkpoint.config import CheckpointConfig
from meshloom.checkpoint.control import Control
from meshloom.checkpoint.files import open_files
from meshloom.checkpoint.folder import load_manifest
from meshloom.checkpoint.reading.compare import read_array
from meshloom.checkpoint.restore import restore
from meshloom.parallel.box import Box
from meshloom.parallel.fragment import Fragment
from support.checkpoint_worlds import together

WHOLE = torch.arange(48, dtype=torch.float32).view(12, 4)


def part(box: Box, *, blank: bool = False, role: str = "scales", splits: tuple[int, ...] = ()) -> Fragment:
    values = WHOLE[box.slices()].clone()
    return Fragment("w", role, tuple(WHOLE.shape), box, values.zero_() if blank else values, splits)


def saved(folder: Path, ranks: list[list[Fragment]]) -> Path:
    def body(control: Control) -> None:
        checkpointer = Checkpointer(folder, control, CheckpointConfig(mode="sync", timeout=60))
        checkpointer.save(1, ranks[control.rank], {})
        checkpointer.finish()

    together(len(ranks), body)
    return folder / "step-00000001"


def restored(folder: Path, ranks: list[list[Fragment]]) -> None:
    def body(control: Control) -> None:
        restore(folder, ranks[control.rank], control)

    together(len(ranks), body)
    for fragment in (fragment for rank in ranks for fragment in rank):
        assert torch.equal(fragment.tensor, WHOLE[fragment.box.slices()])


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10**6))
def test_the_rest_of_a_box_is_counted_once(seed: int) -> None:
    rng = random.Random(seed)
    shape = tuple(rng.randrange(1, 6) for _ in range(rng.randrange(1, 4)))

    def draw() -> Box:
        offsets = tuple(rng.randrange(extent) for extent in shape)
        return Box(offsets, tuple(rng.randrange(1, extent - at + 1) for extent, at in zip(shape, offsets, strict=True)))

    box, other = draw(), draw()
    count = np.zeros(shape, int)
    for rest in box.without(other):
        count[rest.slices()] += 1
    expected = np.zeros(shape, int)
    expected[box.slices()] = 1
    expected[other.slices()] = 0
    assert (count == expected).all()


def test_blocks_that_lie_across_a_cut_are_held_on_both_sides(tmp_path: Path) -> None:
    cut = [Box((0, 0), (5, 4)), Box((4, 0), (4, 4)), Box((7, 0), (5, 4))]
    folder = saved(tmp_path, [[part(box)] for box in cut])
    assert torch.equal(read_array(open_files(folder), load_manifest(open_files(folder)), "scales/w"), WHOLE)
    other = [Box((0, 0), (9, 4)), Box((8, 0), (4, 4))]
    restored(folder, [[part(box, blank=True)] for box in other])


@pytest.mark.parametrize("owner", [0, 1, 2])
def test_a_whole_array_on_one_rank_moves_to_another(tmp_path: Path, owner: int) -> None:
    whole = Box.whole(WHOLE.shape)
    folder = saved(tmp_path, [[part(whole)], [part(Box((0, 0), (12, 4)), role="weight")], []])
    ranks: list[list[Fragment]] = [[part(whole, blank=True, role="weight")] for _ in range(3)]
    ranks[owner].append(part(whole, blank=True))
    restored(folder, ranks)


def test_split_points_are_kept(tmp_path: Path) -> None:
    folder = saved(tmp_path, [[part(Box((0, 0), (6, 4)), splits=(4, 8))], [part(Box((6, 0), (6, 4)), splits=(4, 8))]])
    assert load_manifest(open_files(folder)).arrays["scales/w"].splits == (4, 8)
