"""Data order (R1): a bijection per epoch, and nothing lost or repeated whatever the batch size and the number of ranks."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from meshloom.config.hashing import hash64
from meshloom.data.assignment import Assigner
from meshloom.data.batch import GlobalBatch, Sample, document_lengths, sample_part
from meshloom.data.reading import Shifted, Unread
from meshloom.data.samples.blend import MixedSamples
from meshloom.data.samples.order import Permutation, Shuffled, ValidationSamples, shuffled_position


class Numbers:
    """Samples that hold their own position."""

    seq_len = 1
    vocabulary = 1 << 30

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Sample:
        assert 0 <= index < self.size
        return Sample(np.array([index]), np.array([index]))


@settings(deadline=None)
@given(st.integers(1, 20_000), st.integers(0, 2**64 - 1))
def test_permutation_is_a_bijection(size: int, key: int):
    permutation = Permutation(size, key)
    found = permutation.map(np.arange(size))
    assert np.array_equal(np.sort(found), np.arange(size))
    some = range(0, size, max(1, size // 7))
    assert [permutation(index) for index in some] == [int(found[index]) for index in some]


@pytest.mark.parametrize("size", [10**12 + 39, 2**63 - 25])
def test_huge_permutation_has_no_collision_and_stays_inside(size: int):
    permutation = Permutation(size, 5)
    found = [permutation(index) for index in [*range(500), *range(size - 500, size)]]
    assert len(set(found)) == 1000
    assert min(found) >= 0 and max(found) < size
    assert permutation.map(np.arange(500)).tolist() == found[:500]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_out_of_range_is_refused(size: int):
    for index in (-1, size):
        with pytest.raises(IndexError):
            Permutation(size, 0)(index)
    with pytest.raises(IndexError):
        Permutation(size, 0).map(np.array([size]))


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_small_permutations_are_uniform(size: int):
    """All size! orders come up equally often over keys: chi-square at p > 1e-4 (fixed keys, so it can't flicker)."""
    orders = Counter(tuple(Permutation(size, hash64(key)).map(np.arange(size)).tolist()) for key in range(6000))
    possible = int(np.prod(range(1, size + 1)))
    assert len(orders) == possible
    assert stats.chisquare([*orders.values()]).pvalue > 1e-4


def test_large_permutation_looks_random():
    """Positions are uncorrelated with indices, and neighbours don't stay neighbours (as for random.shuffle: one pair)."""
    size = 50_000
    found = Permutation(size, 3).map(np.arange(size))
    assert abs(np.corrcoef(np.arange(size), found)[0, 1]) < 4 / size**0.5
    assert np.count_nonzero(np.abs(np.diff(found)) == 1) < 12
    counts = np.histogram2d(np.arange(size), found, bins=16)[0]
    assert stats.chisquare(counts.ravel()).pvalue > 1e-4


def test_epochs_and_seeds_give_other_orders():
    def epoch(number: int, seed: int) -> list[int]:
        return [shuffled_position(number * 100 + index, 100, seed)[1] for index in range(100)]

    orders = [epoch(0, 1), epoch(1, 1), epoch(0, 2)]
    assert all(sorted(order) == list(range(100)) for order in orders)
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert shuffled_position(250, 100, 1)[0] == 2


@settings(deadline=None)
@given(
    st.integers(1, 200),
    st.integers(0, 9),
    st.lists(st.tuples(st.integers(1, 6), st.integers(1, 24), st.integers(1, 4)), min_size=1),
)
def test_each_sample_once_when_ranks_and_batch_change(size: int, seed: int, phases: list[tuple[int, int, int]]):
    """Each phase has its own (data-parallel size, samples, micro-batch): the union is the sequential run."""
    samples = Shuffled(Numbers(size), seed)
    consumed = 0
    seen: list[int] = []
    while consumed < 2 * size:
        for ranks, count, micro in phases:
            batch = GlobalBatch(consumed, count)
            parts = Assigner(ranks).assign(batch, micro).ranks
            dealt = sorted(index for rank in parts for part in rank for index in part)
            seen += [int(samples[index].tokens[0]) for index in dealt]
            consumed += batch.count
    assert seen[:size] != seen[size : 2 * size] or size < 8
    assert sorted(seen[:size]) == sorted(seen[size : 2 * size]) == list(range(size))
    assert seen == [int(samples[index].tokens[0]) for index in range(consumed)]


def test_validation_order_is_finite_fixed_and_complete():
    held = ValidationSamples(Numbers(37))
    order = [int(held[index].tokens[0]) for index in range(len(held))]
    assert sorted(order) == list(range(37)) and order != list(range(37))
    with pytest.raises(IndexError):
        held[37]


class Marked(Numbers):
    """Samples of eight positions in three documents, which say so or not."""

    seq_len = 8

    def __getitem__(self, index: int) -> Sample:
        return Sample(np.arange(index, index + 8), np.arange(index + 1, index + 9), np.array([0, 0, 0, 1, 2, 2, 2, 2]))


class Telling(Marked):
    """Samples that must not be read for their lengths and parts."""

    def __getitem__(self, index: int) -> Sample:
        raise AssertionError("nobody asked for the whole sample")

    def lengths(self, index: int) -> np.ndarray:
        return np.array([3, 1, 4])

    def part(self, index: int, start: int, stop: int) -> Sample:
        return Marked.__getitem__(self, index).part(start, stop)


@pytest.mark.parametrize("kind", [Marked, Telling])
def test_orders_pass_on_lengths_and_parts(kind: type[Marked]):
    reference = Shuffled(Marked(11), seed=5)
    mixed = MixedSamples([Shuffled(kind(11), seed=5), Shuffled(kind(11), seed=5)], [2, 1], seed=4)
    for index in range(25):
        source, within = mixed.blend(index)
        assert source in (0, 1) and document_lengths(mixed, index).tolist() == [3, 1, 4]
        whole = reference[within]
        part = sample_part(mixed, index, 2, 5)
        assert (part.tokens.tolist(), part.targets.tolist()) == (whole.tokens[2:5].tolist(), whole.targets[2:5].tolist())
    later = Shifted(Unread(Shuffled(kind(11), seed=5), [3, 1]), by=2)  # of the unread 1, 3, 4, 5, … from the third on
    assert document_lengths(later, 0).tolist() == [3, 1, 4]
    assert sample_part(later, 0, 2, 5).tokens.tolist() == reference[4].tokens[2:5].tolist()
    held = ValidationSamples(kind(11))
    assert [document_lengths(held, k).tolist() for k in range(11)] == [[3, 1, 4]] * 11
    expected = [ValidationSamples(Marked(11))[k].tokens[6:].tolist() for k in range(11)]
    assert [sample_part(held, k, 6, 8).tokens.tolist() for k in range(11)] == expected
