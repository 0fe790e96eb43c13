"""The prefetching loader: correct whatever it prefetched, and its thread's errors reach the caller."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from meshloom.data.assignment import Assigner, Share
from meshloom.data.batch import GlobalBatch, Sample, Samples
from meshloom.data.loader import Loader
from meshloom.data.synthetic import RandomTokens


class Recorded:
    """Samples that hold their own index, and record the indices and threads of their readers."""

    seq_len = 2
    vocabulary = 1 << 30

    def __init__(self, broken: int | None = None) -> None:
        self.asked: list[int] = []
        self.threads: set[int] = set()
        self.broken = broken

    def __getitem__(self, index: int) -> Sample:
        self.threads.add(threading.get_ident())
        if index == self.broken:
            raise ValueError(f"sample {index} is damaged")
        self.asked.append(index)
        return Sample(np.full(2, index), np.full(2, index))


@pytest.fixture
def samples() -> Recorded:
    return Recorded()


def first_tokens(loader: Loader, first: int, count: int, micro: int) -> list[list[int]]:
    return [batch.tokens_BS[:, 0].tolist() for batch in loader.load(GlobalBatch(first, count), micro).micro_batches]


def test_a_rank_gets_its_share_in_micro_batches(samples: Recorded):
    loader = Loader(samples, Assigner(2), data_rank=1)
    assert first_tokens(loader, 10, 8, 2) == [[12, 13], [16, 17]]
    assert first_tokens(loader, 20, 10, 5) == [[25, 26, 27, 28, 29]]
    loader.close()
    assert threading.get_ident() not in samples.threads


def test_the_right_guess_is_used(samples: Recorded):
    loader = Loader(samples, Assigner(), 0)
    for step in range(5):
        assert first_tokens(loader, 4 * step, 4, 4) == [[4 * step + place for place in range(4)]]
    loader.close()
    assert len(samples.asked) == len(set(samples.asked))


def test_a_wrong_guess_is_thrown_away(samples: Recorded):
    loader = Loader(samples, Assigner(), 0)
    assert first_tokens(loader, 0, 4, 4) == [[0, 1, 2, 3]]
    assert first_tokens(loader, 4, 2, 2) == [[4, 5]]  # another size
    assert first_tokens(loader, 6, 2, 1) == [[6], [7]]  # another micro-batch
    assert first_tokens(loader, 0, 2, 1) == [[0], [1]]  # another place
    loader.close()


def test_a_batch_dealt_by_worker_is_guessed_where_the_next_step_is_measured(samples: Recorded):
    class Noting(Assigner):
        def load(self, samples: Samples, batch: GlobalBatch, micro: int, data_rank: int, *, by_worker: bool = False) -> Share:
            asked.append((batch.first, by_worker))
            return super().load(samples, batch, micro, data_rank, by_worker=by_worker)

    asked: list[tuple[int, bool]] = []
    loader = Loader(samples, Noting(), 0)
    for first, measured, following in ((0, False, True), (2, True, False), (4, True, False), (6, False, False)):
        loader.load(GlobalBatch(first, 2), 2, by_worker=measured, next_by_worker=following)
    loader.close()
    made = [each for each in asked if each[0] < 8 and each != (4, False)]  # a wrong guess may have been cancelled
    assert made == [(0, False), (2, True), (4, True), (6, False)]


def test_errors_reach_the_caller_only_when_they_matter():
    loader = Loader(Recorded(broken=5), Assigner(), 0)
    assert first_tokens(loader, 0, 4, 4) == [[0, 1, 2, 3]]  # the guess behind it meets sample 5
    assert first_tokens(loader, 8, 4, 4) == [[8, 9, 10, 11]]
    with pytest.raises(ValueError, match="sample 5 is damaged"):
        loader.load(GlobalBatch(4, 4), 4)
    assert first_tokens(loader, 6, 2, 2) == [[6, 7]]  # it is not broken by that
    assert first_tokens(loader, 0, 3, 3) == [[0, 1, 2]]
    with pytest.raises(ValueError, match="sample 5 is damaged"):
        loader.load(GlobalBatch(3, 3), 3)  # a right guess that failed
    loader.close()


def test_the_loss_per_batch_is_that_of_the_samples():
    samples = RandomTokens(seq_len=8, vocabulary=100, seed=3)
    loader = Loader(samples, Assigner(), 0)
    (batch,) = loader.load(GlobalBatch(0, 3), 3).micro_batches
    loader.close()
    assert batch.valid_tokens == 24
    assert torch.equal(batch.tokens_BS[:, 1:], batch.targets_BS[:, :-1])


@pytest.mark.gpu
def test_batches_are_pinned_on_request(samples: Recorded):
    loader = Loader(samples, Assigner(), 0, pin=True)
    (batch,) = loader.load(GlobalBatch(0, 2), 2).micro_batches
    loader.close()
    assert batch.tokens_BS.is_pinned() and batch.targets_BS.is_pinned()
