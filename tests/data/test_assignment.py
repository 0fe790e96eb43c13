"""Assignment: every sample once, in order; the same cut on every layout; blanks for what is missing."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshloom.data.assignment import Assigner, BatchAssignment, load_share
from meshloom.data.batch import IGNORED, GlobalBatch, Sample
from meshloom.parallel.config import ParallelConfig
from meshloom.parallel.pipeline.stages import SCHEDULES, legal_micro_batches

COUNTS, SIZES, RANKS = st.integers(1, 60), st.integers(1, 9), st.integers(1, 7)


def in_order(assignment: BatchAssignment) -> list[range]:
    """List the micro-batches of the global batch without blanks: pass by pass, rank by rank."""
    passes = zip(*assignment.ranks, strict=True)
    return [indices for one in passes for indices in one if indices]


@settings(deadline=None)
@given(COUNTS, SIZES, RANKS, st.booleans())
def test_the_cut_is_in_order_and_the_same_on_every_layout(count: int, micro: int, ranks: int, halves: bool) -> None:
    batch = GlobalBatch(100, count)
    assignment = Assigner(ranks, halves=halves).assign(batch, micro)
    cut = in_order(assignment)
    assert [index for indices in cut for index in indices] == list(batch.indices())
    assert cut == [indices for indices in Assigner().assign(batch, micro).ranks[0] if indices]
    assert all(len(indices) == min(micro, count) for indices in cut[:-1])
    assert assignment.workers == len(cut) == -(-count // micro)


@settings(deadline=None)
@given(COUNTS, SIZES, RANKS)
def test_every_rank_runs_as_few_passes_as_can_be(count: int, micro: int, ranks: int) -> None:
    assigner = Assigner(ranks)
    assignment = assigner.assign(GlobalBatch(0, count), micro)
    assert {len(rank) for rank in assignment.ranks} == {assignment.passes} == {assigner.passes(count, micro)}
    assert assignment.passes == -(-assignment.workers // ranks)
    rows = assignment.rows * assignment.passes * ranks
    assert assigner.blank_share(count, micro) == pytest.approx((rows - count) / rows)


@settings(deadline=None)
@given(COUNTS, SIZES, RANKS)
def test_halves_are_those_of_the_global_list(count: int, micro: int, ranks: int) -> None:
    """The micro-batches before the boundary on all ranks are the first half, whatever the layout."""
    assignment = Assigner(ranks, halves=True).assign(GlobalBatch(0, count), micro)
    assert assignment.first_half is not None
    early = {index for rank in assignment.ranks for part in rank[: assignment.first_half] for index in part}
    cut = in_order(assignment)
    assert early == {index for part in cut[: len(cut) // 2] for index in part}
    assert {len(rank) for rank in assignment.ranks} == {assignment.passes}


@settings(deadline=None)
@given(COUNTS, SIZES, st.integers(1, 4), st.sampled_from(sorted(SCHEDULES)), st.integers(2, 4))
def test_a_pipeline_gets_the_next_count_it_can_run(count: int, micro: int, ranks: int, schedule: str, pp: int) -> None:
    can_run = functools.partial(legal_micro_batches, ParallelConfig(pp=pp, schedule=schedule))
    least = Assigner(ranks).passes(count, micro)
    passes = Assigner(ranks, can_run).assign(GlobalBatch(0, count), micro).passes
    assert can_run(passes) and not any(can_run(fewer) for fewer in range(least, passes))


@settings(deadline=None)
@given(COUNTS, SIZES, RANKS, st.booleans(), st.sampled_from([1, 3]))
def test_the_sizes_named_need_no_blanks(count: int, micro: int, ranks: int, halves: bool, unit: int) -> None:
    assigner = Assigner(ranks, lambda passes: passes % unit == 0, halves)
    sizes = assigner.sizes_without_blanks(count, micro)
    assert all(assigner.blank_share(size, micro) == 0 for size in sizes)
    assert sizes[-1] >= count and not any(
        assigner.blank_share(size, micro) == 0 for size in range(max(count, micro), sizes[-1])
    )
    below = [size for size in range(micro, count) if assigner.blank_share(size, micro) == 0]
    assert sizes[-1] == count or sizes[:-1] == below[-1:]


@dataclass
class Numbered:
    """Samples that hold their own index."""

    documents: bool
    seq_len: int = 3
    vocabulary: int = 1 << 30

    def __getitem__(self, index: int) -> Sample:
        documents = np.array([0, 0, 1]) if self.documents else None
        return Sample(np.full(3, index), np.full(3, index), documents)


@pytest.mark.parametrize("documents", [False, True])
def test_blanks_have_the_usual_shape_and_no_targets(documents: bool) -> None:
    assignment = Assigner(3).assign(GlobalBatch(10, 7), 2)  # the example of the module's docstring
    shares = [load_share(Numbered(documents), assignment, rank) for rank in range(3)]
    tokens = [[batch.targets_BS[:, 0].tolist() for batch in share.micro_batches] for share in shares]
    blank = [IGNORED, IGNORED]
    assert tokens == [[[10, 11], [16, IGNORED]], [[12, 13], blank], [[14, 15], blank]]
    assert {batch.tokens_BS.shape for share in shares for batch in share.micro_batches} == {(2, 3)}
    assert all((batch.documents is not None) == documents for share in shares for batch in share.micro_batches)
    assert [share.valid_tokens for share in shares] == [9, 6, 6]
    assert {(share.passes, share.workers, share.first_half) for share in shares} == {(2, 4, None)}


def test_a_batch_smaller_than_a_micro_batch_is_not_filled_up() -> None:
    assert Assigner().assign(GlobalBatch(0, 3), 8).rows == 3
    assert Assigner().blank_share(3, 8) == 0
