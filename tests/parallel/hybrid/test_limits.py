"""Refusals of what hybrid data parallelism can't be combined with, by key with a fix."""

from __future__ import annotations

from typing import Any

import pytest

from meshloom.parallel.config import ParallelConfig
from meshloom.parallel.hybrid.limits import capacity_problems, hybrid_problems
from support.configs import problems_of

FINE: dict[str, Any] = {"masked": True, "halves": False, "cut_losses": [], "drops_tokens": False, "float8": "none"}
FINE["keeps_all"] = True
REFUSED = [
    ("parallel.hdp", {"engine": "deepspeed"}, {}),
    ("parallel.cp", {"cp": 2}, {}),
    ("data.document_mask", {}, {"masked": False}),
    ("optim", {}, {"halves": True}),
    ("balance.sequence", {}, {"cut_losses": ["balance.sequence"]}),
    ("balance.counts", {}, {"cut_losses": ["balance.counts"]}),
    ("model.experts.capacity", {}, {"drops_tokens": True}),
    ("trainer.float8", {}, {"float8": "rowwise"}),
    ("parallel.hdp_offload", {"hdp_costs": "h100", "hdp_offload": True, "pp": 2}, {}),
    ("parallel.hdp_offload", {"hdp_costs": "h100", "hdp_offload": True, "offload": "cpu"}, {}),
    ("parallel.hdp_offload", {"hdp_costs": "h100", "hdp_offload": True}, {"keeps_all": False}),
]


@pytest.mark.parametrize(("key", "parallel", "others"), REFUSED, ids=[key for key, *_ in REFUSED])
def test_keys_that_do_not_fit_are_refused(key: str, parallel: dict[str, Any], others: dict[str, Any]) -> None:
    found = list(hybrid_problems(ParallelConfig(hdp="greedy", **parallel), **{**FINE, **others}))
    assert [problem.key for problem in found] == [key] and all(problem.fix for problem in found)
    assert not list(hybrid_problems(ParallelConfig(hdp="greedy"), **FINE))


@pytest.mark.parametrize(("tokens", "ranks", "refused"), [(100, 10, False), (100, 9, True), (None, 1, False)])
def test_a_document_must_fit_on_all_ranks_together(tokens: int | None, ranks: int, refused: bool) -> None:
    parallel = ParallelConfig(hdp="greedy", hdp_tokens=tokens)
    found = list(capacity_problems(parallel, micro=2, seq_len=1000, data_size=ranks))
    assert [problem.key for problem in found] == ["parallel.hdp_tokens"] * refused
    assert not refused or "112 or more" in found[0].fix


def test_rows_are_counted_in_what_kernels_like() -> None:
    refused, fits = (
        list(capacity_problems(ParallelConfig(hdp="greedy", hdp_tokens=tokens), micro=1, seq_len=8000, data_size=8))
        for tokens in (1005, 1008)
    )
    assert [problem.key for problem in refused] == ["parallel.hdp_tokens"] and not fits
    assert "8 × 992" in refused[0].message and "use 1008 or more" in refused[0].fix


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("parallel.hdp", {"hdp": "best"}),
        ("parallel.ring_exchange", {"ring_exchange": "values"}),
        ("parallel.hdp_tokens", {"hdp_tokens": 100}),
        ("parallel.hdp_tokens", {"hdp": "greedy", "hdp_tokens": 1, "tp": 2}),
    ],
)
def test_values_are_checked(key: str, values: dict[str, Any]) -> None:
    assert [problem.key for problem in ParallelConfig(**values).problems()] == [key]


def test_queries_are_not_sent_between_more_ranks_than_are_connected() -> None:
    words = ["recipe=quickstart", "data.document_mask=true", "data.packing=bestfit", "parallel.zero=1", "parallel.hdp=greedy"]
    words += ["batch.samples=16", "batch.micro=1", "parallel.ring_exchange=queries"]
    assert "16 members" in problems_of(16, *words)["parallel.ring_exchange"]
    assert "parallel.ring_exchange" not in problems_of(16, *words, "parallel.ring_direct=16")
