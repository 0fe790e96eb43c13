"""Costs of documents: pairs counted one by one, and a model's FLOPs at each length."""

from __future__ import annotations

from itertools import pairwise

import pytest

from meshloom.models.config import DecoderConfig
from meshloom.models.costs import flops_per_token
from meshloom.parallel.hybrid.cost import CostModel, costs_of, decoder_flops, least_time, module_flops
from meshloom.parallel.hybrid.planning import assign

WINDOWED = {"layers": 6, "layer_types": ["sliding", "sliding", "full"], "sliding_window": 7}


@pytest.mark.parametrize("length", [1, 6, 7, 8, 30])
def test_windows_count_the_pairs_that_are_seen(length: int) -> None:
    pairs = sum(query - 7 < key <= query for query in range(length) for key in range(length))
    found = CostModel(0.0, 0.0, windows=((7, 1.0),))
    assert found.document(length) == 2 * pairs - length
    assert found.documents([length, 1]) == [2 * pairs - length, 1]


@pytest.mark.parametrize("length", [1, 5, 7, 100])
def test_flops_are_those_of_the_model_at_each_length(length: int) -> None:
    shape = DecoderConfig.of({"dim": 24, "heads": 4, "kv_heads": 2, "ffn_dim": 36, "vocabulary": 61, **WINDOWED})
    flops = decoder_flops(shape)
    assert flops.document(length) == pytest.approx(length * flops_per_token(shape, length), rel=1e-12)
    (window,) = flops.windows
    assert window == (7, 2 * flops.quadratic), "four layers slide, two don't"
    told = module_flops(lambda n: 50.0 + 2 * n, 16)
    assert told.document(length) == 50 * length + 2 * length**2


def test_half_of_the_scores_is_computed_and_dearer() -> None:
    costs = costs_of(CostModel(8.0, 100.0, windows=((7, 16.0),)))
    assert costs == CostModel(5.0, 100.0, row=51_200.0, windows=((7, 10.0),))


def test_windows_leave_long_documents_on_one_rank() -> None:
    """A long document is as dear as its tokens where no layer sees all of it, so that nobody needs to share it."""
    lengths = [800, *[100] * 28]
    windowed, whole = CostModel(0.0, 1.0, windows=((10, 0.1),)), CostModel(0.1, 1.0)
    assert not assign(lengths, 4, 1000, windowed).shared
    assert [each.document for each in assign(lengths, 4, 1000, whole).shared] == [0]
    times = [least_time(lengths, ranks, 1000, windowed) for ranks in (2, 4, 8)]
    assert all(one == pytest.approx(2 * other) for one, other in pairwise(times))
