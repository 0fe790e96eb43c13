"""The rows that ranks read: all of them together hold every position of the batch's documents once, and its targets."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshloom.data.assignment import Share
from meshloom.data.batch import IGNORED, GlobalBatch, Sample
from meshloom.parallel.context.ring_plan import plan_rings
from meshloom.parallel.hybrid.cost import CostModel
from meshloom.parallel.hybrid.planning import row_unit
from meshloom.parallel.hybrid.share import HybridAssigner


class Packed:
    """Samples of documents of these lengths, padded; a token tells its sample, document and position. Implements `Samples`."""

    seq_len, vocabulary = 40, 10**9

    def __init__(self, lengths: Sequence[Sequence[int]]) -> None:
        self._lengths = lengths

    def lengths(self, index: int) -> np.ndarray:
        return np.array(self._lengths[index], np.int64)

    def part(self, index: int, start: int, stop: int) -> Sample:
        places = [(n, at) for n, length in enumerate(self._lengths[index]) for at in range(length)][start:stop]
        tokens = np.array([1_000_000 + index * 10_000 + number * 100 + at for number, at in places], np.int64)
        return Sample(tokens, np.where(tokens % 3 == 0, IGNORED, tokens + 1))

    def __getitem__(self, index: int) -> Sample:
        raise AssertionError("nobody needs whole samples")


def shares(lengths: Sequence[Sequence[int]], ranks: int, **settings: bool | int) -> list[Share]:
    assigner = HybridAssigner(ranks, CostModel(1.0, 50.0), **settings)
    return [assigner.load(Packed(lengths), GlobalBatch(0, len(lengths)), 1, rank) for rank in range(ranks)]


ROWS = st.lists(st.integers(1, 40), min_size=1, max_size=6).filter(lambda row: sum(row) <= 40)


@given(st.lists(ROWS, min_size=1, max_size=5), st.integers(2, 5), st.integers(20, 40), st.booleans(), st.integers(1, 3))
@settings(deadline=None, max_examples=60)
def test_every_position_is_read_once(lengths: list[list[int]], ranks: int, capacity: int, lockstep: bool, unit: int) -> None:
    found: list[tuple[int, int, int]] = []
    dealt = shares(lengths, ranks, capacity=capacity, lockstep=lockstep, unit=unit)
    for rank, share in enumerate(dealt):
        for row in share.micro_batches:
            assert row.documents is not None and row.positions_BS is not None and row.documents.host_rings is not None
            assert row.tokens_BS.shape[0] == 1 and row.tokens_BS.shape[1] % unit == 0
            tokens, targets, positions = (each[0].tolist() for each in (row.tokens_BS, row.targets_BS, row.positions_BS))
            bounds = row.documents.host_cu_seqlens.tolist()
            plan = plan_rings(tuple(row.documents.host_rings.tolist()), rank)
            assert list(plan.own) == [stop - start for start, stop in pairwise(bounds)]
            ids = row.documents.ids_BS[0].tolist()
            assert [ids.index(n) for n in range(len(bounds) - 1)] == bounds[:-1]
            padded = [at for at, token in enumerate(tokens) if token == 0]
            assert padded == list(range(len(tokens) - len(padded), len(tokens))) and len(padded) <= unit
            for at, token in enumerate(tokens):
                if at in padded:
                    assert targets[at] == IGNORED and ids[at] == ids[-1]
                    continue
                assert positions[at] == token % 100
                assert targets[at] == (IGNORED if token % 3 == 0 else token + 1)
                found.append((token // 10_000 - 100, token // 100 % 100, token % 100))
    expected = [(k, n, at) for k, row in enumerate(lengths) for n, length in enumerate(row) for at in range(length)]
    assert sorted(found) == expected


def test_ranks_agree_on_what_a_step_needs() -> None:
    lengths = [[40], [10, 20], [5, 5, 5]]
    dealt = shares(lengths, 3, capacity=20)
    assert len({(share.passes, share.checksum, share.flops) for share in dealt}) == 1
    squares = 40**2 + 10**2 + 20**2 + 3 * 5**2
    assert dealt[0].flops == 50 * 85 + squares
    assert shares([[40], [10, 20], [5, 5, 6]], 3, capacity=20)[0].checksum != dealt[0].checksum


def test_flops_are_those_of_each_document_at_its_length() -> None:
    windowed = HybridAssigner(2, CostModel(0.0, 50.0, windows=((10, 1.0),)))
    share = windowed.load(Packed([[40], [5, 5]]), GlobalBatch(0, 2), 1, 0)
    assert share.flops == 50 * 50 + (10 * 71 - 40) + 2 * 25


def test_a_measured_step_has_the_workers_of_a_run_without_it() -> None:
    lengths, assigner = [[40], [10, 20], [5, 5, 5], [7], [30]], HybridAssigner(4, CostModel(1.0, 50.0), capacity=40)
    batch = GlobalBatch(0, 5)
    dealt = [assigner.load(Packed(lengths), batch, 2, rank, by_worker=True) for rank in range(4)]
    told = [share.worker_rows for share in dealt]
    assert {share.workers for share in dealt} == {3} and {len(share.micro_batches) for share in dealt} == {2}
    assert [each and (each.ranks, each.own) for each in told] == 2 * [(2, (0,))] + 2 * [(2, (2, 1))]
    held: dict[int, set[int]] = {}
    for share, each in zip(dealt, told, strict=True):
        assert each is not None
        for row, turn in zip(share.micro_batches, each.turns, strict=True):
            samples = {token // 10_000 - 100 for token in row.tokens_BS[0].tolist() if token}
            if turn is None:
                assert not samples
            else:
                held.setdefault(each.own[turn], set()).update(samples)
    assert held == {0: {0, 1}, 1: {2, 3}, 2: {4}}
    unmeasured = assigner.load(Packed(lengths), batch, 2, 0)
    assert unmeasured.workers == 0 and unmeasured.worker_rows is None


@pytest.mark.parametrize(("samples", "ranks_of_worker", "positions"), [(8, 1, 80), (2, 2, 43)])
def test_rows_of_a_pipeline_are_filled_up_to_a_share_of_a_worker(samples: int, ranks_of_worker: int, positions: int) -> None:
    """Workers of two samples of 40, in rows that could have 400 positions. One of two ranks has 40 and a sixteenth."""
    assigner = HybridAssigner(2, CostModel(1.0, 50.0), capacity=400, classes=1, stages=2)
    packed = Packed([[20, 20]] * (samples - 1) + [[40]])
    for rank in range(2):
        share = assigner.load(packed, GlobalBatch(0, samples), 2, rank, by_worker=True)
        assert share.worker_rows is not None and share.worker_rows.ranks == ranks_of_worker
        assert {row.tokens_BS.shape[1] for row in share.micro_batches} == {positions}
    assert assigner.load(packed, GlobalBatch(0, samples), 2, 0).micro_batches[0].tokens_BS.shape[1] == 400


def test_ranks_notice_that_one_takes_other_workers_for_the_same_rows() -> None:
    """One rank measures the step and the other does not, and both plans have the same rows: a worker is a row here."""
    assigner, batch = HybridAssigner(1, CostModel(1.0, 50.0), capacity=40), GlobalBatch(0, 2)
    samples = Packed([[10], [40]])
    measured, unmeasured = (assigner.load(samples, batch, 1, 0, by_worker=by_worker) for by_worker in (True, False))
    assert measured.passes == unmeasured.passes == 2
    assert measured.checksum != unmeasured.checksum


def test_no_row_is_filled_up_beyond_the_capacity() -> None:
    dealt = shares([[17, 17]] * 6, 4, capacity=19, unit=4)
    assert max(row.tokens_BS.shape[1] for share in dealt for row in share.micro_batches) <= 19


def test_long_rows_are_multiples_of_what_kernels_like() -> None:
    assert [row_unit(capacity, 2) for capacity in (32_768, 1024, 100)] == [256, 32, 2]


@given(st.integers(1, 400), st.integers(1, 400), st.integers(1, 7), st.sampled_from([None, 1, 8]))
def test_a_compiler_sees_few_lengths_of_rows(filled: int, row_tokens: int, unit: int, classes: int | None) -> None:
    assigner = HybridAssigner(2, CostModel(1.0, 50.0), unit=unit, classes=classes)
    whole, length = -(-row_tokens // unit) * unit, assigner.padded(min(filled, row_tokens), row_tokens)
    assert min(filled, row_tokens) <= length <= whole and length % unit == 0
    assert assigner.padded(row_tokens, row_tokens) == whole
    if classes is not None:
        assert len({assigner.padded(n, row_tokens) for n in range(row_tokens + 1)}) <= classes
