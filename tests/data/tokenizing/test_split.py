"""The split into training and validation data: the share that is asked for, whatever the documents."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshloom.config.hashing import stream64
from meshloom.data.tokenizing.split import PassageSplit, is_near

LENGTHS = st.lists(st.integers(1, 5000), min_size=1, max_size=30).filter(lambda lengths: sum(lengths) > 1)


def hashes(count: int) -> np.ndarray:
    return stream64(7, count)


@settings(deadline=None)
@given(LENGTHS, st.floats(0.001, 0.9))
def test_passages_cover_every_document_and_hold_the_share(lengths: list[int], share: float):
    split = PassageSplit(hashes(len(lengths)), np.array(lengths), share)
    held = 0
    for number, length in enumerate(lengths):
        passages = list(split.passages(number))
        assert passages[0].start == 0 and passages[-1].stop == length
        assert all(one.stop == other.start and one.held_out != other.held_out for one, other in pairwise(passages))
        held += sum(passage.stop - passage.start for passage in passages if passage.held_out)
    total = sum(lengths)
    asked = min(max(1, round(total * share)), total - 1)
    # A window's two edges move by an eighth of it, or of what is left, at most; whole tokens are the rest.
    assert abs(held - asked) <= min(asked, total - asked) / 4 + 64 and 0 < held < total


@settings(deadline=None)
@given(LENGTHS, st.floats(0.001, 0.5), st.randoms(use_true_random=False))
def test_the_order_of_documents_does_not_matter(lengths: list[int], share: float, random: object):
    order = list(range(len(lengths)))
    random.shuffle(order)  # type: ignore[attr-defined]
    names, sizes = hashes(len(lengths)), np.array(lengths)
    one, other = PassageSplit(names, sizes, share), PassageSplit(names[order], sizes[order], share)
    assert all(list(one.passages(was)) == list(other.passages(now)) for now, was in enumerate(order))


def test_copies_are_cut_alike():
    lengths = np.array([400, 3000, 400, 3000, 3000])
    split = PassageSplit(np.array([5, 9, 5, 9, 9], np.uint64), lengths, 0.2)
    assert list(split.passages(0)) == list(split.passages(2))
    assert list(split.passages(1)) == list(split.passages(3)) == list(split.passages(4))
    held = [passage for passage in split.passages(1) if passage.held_out]
    assert held and sum(passage.stop - passage.start for passage in held) == pytest.approx(600, rel=0.3)


def test_no_text_with_a_copy_is_held_out_where_copies_differ():
    """The fault: under fill-in-the-middle copies differ in length and order, and one was held out beside the other."""
    names = np.concatenate([[5, 5], hashes(30), [6, 6]]).astype(np.uint64)
    lengths = np.array([1000, 1003, *[500] * 30, 700, 700])
    split = PassageSplit(names, lengths, 0.3, copies_differ=True)
    passages = [list(split.passages(number)) for number in range(34)]
    for copy in (0, 1, 32, 33):
        assert [(each.start, each.stop, each.held_out) for each in passages[copy]] == [(0, lengths[copy], False)]
    assert all(parts[0].start == 0 and parts[-1].stop == 500 for parts in passages[2:32])
    held = sum(each.stop - each.start for parts in passages for each in parts if each.held_out)
    assert held == pytest.approx(0.3 * lengths.sum(), rel=0.1)
    with pytest.raises(ValueError, match="every text has a copy"):
        PassageSplit(names[:2], lengths[:2], 0.3, copies_differ=True)


def test_short_documents_stay_whole():
    lengths = np.full(2000, 50)
    split = PassageSplit(hashes(2000), lengths, 0.1)
    passages = [list(split.passages(number)) for number in range(2000)]
    assert all(len(parts) == 1 for parts in passages)
    assert sum(parts[0].held_out for parts in passages) == pytest.approx(200, abs=10)


@pytest.mark.parametrize(
    ("held", "total", "share", "near"),
    [(10, 1000, 0.01, True), (19, 1000, 0.01, True), (4, 1000, 0.01, False), (346, 1000, 0.01, False), (0, 10, 0.1, False),
     (10, 10, 0.9, False), (99, 100, 0.9, False), (85, 100, 0.9, True)],
)  # fmt: skip
def test_sizes_near_the_share(held: int, total: int, share: float, near: bool):
    assert is_near(held, total, share) == near
