"""The steps at which copies are compared: on ranks that have none, too, and before the save of a run that is asked to stop."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from meshloom.parallel.replicas import Replicas
from meshloom.trainer.hooks.replicas import farther
from support.ranks import run_ranks
from support.tiny_run import body


def compared(rank: int, world_size: int, words: list[str]) -> tuple[int, int, bool]:
    """The exit code, how often copies were compared, and whether this rank has any."""
    tables: list[bool] = []
    table = Replicas.table

    def noted(replicas: Replicas) -> torch.Tensor:
        tables.append(replicas.copied > 0)
        return table(replicas)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Replicas, "table", noted)
        code = body(rank, world_size, words)
    return code, len(tables), any(tables)


def test_a_stage_without_copies_takes_part(tmp_path: Path) -> None:
    """Of the dense stage under ZeRO nothing has a copy; of the mixture stage its experts' biases."""
    experts = ["model.experts.count=4", "model.experts.top_k=2", "model.experts.dense_layers=1", "model.experts.ffn_dim=8"]
    layout = ["parallel.pp=2", "parallel.zero=2", "batch.micro=2"]
    words = [f"output_dir={tmp_path}", "trainer.steps=2", "trainer.compare_replicas_every=1", "trainer.eval_every=0"]
    found = run_ranks(4, compared, [*words, *layout, *experts])
    assert [(code, times) for code, times, _ in found] == [(0, 2)] * 4
    assert {own for _, _, own in found} == {False, True}


def test_copies_are_compared_before_the_save_of_a_run_that_stops(tmp_path: Path) -> None:
    words = [f"output_dir={tmp_path}", "trainer.steps=30", "trainer.compare_replicas_every=0", "trainer.eval_every=0"]
    signal = "trainer.hooks=[{_target_:support.run_hooks.Signal,step:3,rank:1,name:SIGTERM}]"
    found = run_ranks(2, compared, [*words, "checkpoint.every=100", "parallel.zero=0", signal])
    assert [times for _, times, _ in found] == [1, 1]


@pytest.mark.parametrize(
    ("then", "now", "wrong"),
    [
        ({0: 1.0, 1: 1.5}, 1.0 + 1e-12, [1]),
        ({0: float("nan"), 1: 1.5}, 1.4, [0]),
        ({0: 1.0, 1: 1.0 + 3e-12}, 1.0 + 1e-12, []),  # what the wrong one has done to the right one is as large
        ({0: 1.0, 1: 1.0, 2: 3.0, 3: 4.0}, 1.0, [2, 3]),
    ],
)
def test_a_copy_is_wrong_only_if_it_is_clearly_farther_from_the_replay(
    then: dict[int, float], now: float, wrong: list[int]
) -> None:
    assert farther(then, now) == wrong
