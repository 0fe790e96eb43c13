"""Measured waiting under hybrid data parallelism."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from meshloom.parallel.compute_time import StepWork
from meshloom.parallel.config import ParallelConfig
from meshloom.parallel.hybrid.cost import CostModel
from meshloom.parallel.hybrid.share import HybridAssigner
from meshloom.parallel.layout import Layout
from meshloom.trainer.hooks.hybrid_waiting import MeasureWaiting
from support.ranks import run_ranks
from support.tiny_run import body

NAME = "hybrid/measured_wait"


def test_waiting_is_the_time_in_which_others_still_work() -> None:
    hook, rows = MeasureWaiting(), [dict[str, Any]() for _ in range(4)]
    work = [StepWork(own, waited) for own, waited in ((0.25, 0.5), (0.5, 0.0), (0.0, 0.0), (0.75, 0.25))]
    loop: Any = SimpleNamespace(work=work)
    for row in rows[:3]:
        hook.on_metrics(loop, row)
    loop.work = [StepWork(0.0, 0.0)] * 4
    hook.on_metrics(loop, rows[3])
    assert rows == [{}, {}, {NAME: (0.75 + 0.5 + 1.0 + 0.25) / 4, "hybrid/ring_wait": 0.75 / 4}, {}]


@pytest.mark.parametrize(
    ("parallel", "measured"), [({"zero": 0}, True), ({"zero": 1, "tp": 2}, True), ({"zero": 2}, False), ({"pp": 2}, False)]
)
def test_nothing_is_measured_where_ranks_meet_in_every_row(parallel: dict[str, int], measured: bool) -> None:
    config = ParallelConfig(hdp="greedy", **parallel)
    dealer = HybridAssigner.of(config, Layout.plan(config, 4), 64, CostModel(1.0, 1.0))
    assert MeasureWaiting.can_measure(dealer) == measured and not MeasureWaiting.can_measure(None)


def test_a_slow_rank_lets_the_other_wait(tmp_path: Path) -> None:
    slow = "trainer.hooks=[{_target_: support.run_hooks.Slow, rank: 1, seconds: 0.1}]"
    texts = [json.dumps({"text": f"this document is number {number:05}"}) for number in range(200)]
    (tmp_path / "a.jsonl").write_text("\n".join(texts))
    data = ["data=jsonl", f"data.input={tmp_path}/a.jsonl", f"data.cache_dir={tmp_path}/cache", "data.tokenizer=bytes"]
    hybrid = ["data.seq_len=32", "data.document_mask=true", "parallel.hdp=greedy", "parallel.zero=1"]
    words = [*data, *hybrid, slow, "trainer.tokens=null", "trainer.steps=4", "trainer.eval_every=0", "checkpoint.every=0"]
    assert run_ranks(2, body, [*words, f"output_dir={tmp_path}"]) == [0, 0]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "hybrid/planned_wait" in row]
    assert [NAME in row for row in steps] == [False, False, True, True]
    measured = [row[NAME] for row in steps[2:]]
    assert max(row["hybrid/planned_wait"] for row in steps) < 0.2 < max(measured) <= 0.5
