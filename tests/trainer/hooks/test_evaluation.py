"""The steps at which a run evaluates: at multiples of any duration, whatever sizes its batches have."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from meshloom.config.duration import Duration, Unit
from meshloom.config.problems import Problem
from meshloom.optim.horizon import Horizon
from meshloom.optim.progress import Progress
from meshloom.parallel.engine import StepLoss
from meshloom.parallel.heartbeat import Heartbeat
from meshloom.trainer.config import TrainerConfig
from meshloom.trainer.hooks.evaluation import Evaluation, EvaluationSet

SEQ_LEN = 10


def evaluated_at(every: str | int | None, sizes: list[int], total: int) -> list[int]:
    """Steps after which an evaluation was made, in a run of `total` samples."""
    seen: list[int] = []
    loop = SimpleNamespace(
        horizon=Horizon(Duration(total, Unit.SAMPLES), SEQ_LEN),
        progress=Progress(),
        mesh=SimpleNamespace(heartbeat=Heartbeat()),
        deliver_metrics=lambda keep: True,
        engine=SimpleNamespace(
            evaluate=lambda batches: StepLoss(torch.zeros(()), torch.ones(()), {}), assignments=lambda: None
        ),
        hooks=[SimpleNamespace(on_evaluate=lambda loop, row: seen.append(row["step"]))],
        restart_clock=lambda: None,
        finished=False,
        stage=None,
    )
    hook = Evaluation([EvaluationSet("", 1.0, [])], None if every is None else Duration.parse(every))
    for size in sizes:
        loop.progress = loop.progress.after(size, size * SEQ_LEN)
        loop.finished = loop.progress.samples >= total
        hook.on_step_end(cast(Any, loop))
    return seen


@pytest.mark.parametrize(
    ("every", "steps"),
    [
        (2, [2, 4, 6]),
        (None, [6]),
        ("8 samples", [2, 3, 4, 5, 6]),  # samples after each step: 4, 8, 16, 24, 40, 56
        ("20 samples", [4, 5, 6]),  # multiples 20, 40 reached, and the end
        ("200 tokens", [4, 5, 6]),
        ("50%", [5, 6]),  # 28 of 56
    ],
)
def test_it_evaluates_where_a_multiple_is_reached(every: str | int | None, steps: list[int]) -> None:
    assert evaluated_at(every, [4, 4, 8, 8, 16, 16], total=56) == steps


def test_sources_of_a_mixture_are_evaluated_apart_and_weighted() -> None:
    found = {
        "code": StepLoss(torch.tensor(6.0), torch.tensor(3.0), {}),
        "c4.en": StepLoss(torch.tensor(4.0), torch.ones(()), {}),
    }
    row = evaluated(found)
    assert row["eval_loss"] == 2.5 and row["validation/code/loss"] == 2.0 and row["validation/c4.en/loss"] == 4.0


def test_a_source_without_targets_is_left_out_of_the_mean(caplog: pytest.LogCaptureFixture) -> None:
    nothing = StepLoss(torch.zeros(()), torch.zeros(()), {})
    assert evaluated({"code": nothing, "c4.en": StepLoss(torch.tensor(4.0), torch.ones(()), {})})["eval_loss"] == 4.0
    assert "no held-out sample of code has a target" in caplog.text
    assert evaluated({"code": nothing, "c4.en": nothing})["eval_loss"] == 0.0


def test_a_named_set_is_no_part_of_the_mean() -> None:
    found = {
        name: StepLoss(torch.tensor(loss), torch.ones(()), {}) for name, loss in (("code", 2.0), ("wiki", 5.0), ("law", 9.0))
    }
    row = evaluated(found, {"code": 1.0, "wiki": 0.0})
    assert row["eval_loss"] == 2.0 and row["validation/wiki/loss"] == 5.0
    assert evaluated(found, {"wiki": 0.0, "law": 0.0})["eval_loss"] == 7.0, "where the training data hold nothing out"


def test_information_is_that_of_sources_with_targets() -> None:
    one = torch.ones(())
    found = {"code": one, "wiki": one, "silent": torch.zeros(()), "law": one}
    counts = {"code": [4.0, 0], "wiki": [0.0, 4], "silent": [2.0, 2], "law": [1.0, 3]}
    row = evaluated(
        {name: StepLoss(tokens, tokens, {}) for name, tokens in found.items()},
        {"code": 1.0, "wiki": 1.0, "silent": 1.0, "law": 0.0},
        {name: torch.tensor([each]) for name, each in counts.items()},
    )
    assert row["routed"] == ["code", "wiki"] and row["experts/0/information"] == pytest.approx(math.log(2))


SHARES = {"code": 3.0, "c4.en": 1.0}
NO_COUNTS: Mapping[str, torch.Tensor] = {}


def evaluated(
    found: dict[str, StepLoss], weights: dict[str, float] = SHARES, counts: Mapping[str, torch.Tensor] = NO_COUNTS
) -> dict[str, Any]:
    """The row of an evaluation of sets with these weights; counts: of experts' assignments, layer 0 alone."""
    rows: list[dict[str, Any]] = []
    routed: list[str] = []
    asked: list[str] = []

    def evaluate(name: Any) -> StepLoss:
        asked.append(name)
        return found[name]

    loop = SimpleNamespace(
        progress=Progress(),
        mesh=SimpleNamespace(is_main=True, heartbeat=Heartbeat()),
        deliver_metrics=lambda keep: True,
        engine=SimpleNamespace(evaluate=evaluate, assignments=lambda: counts.get(asked[-1])),
        hooks=[
            SimpleNamespace(
                on_evaluate=lambda loop, row: rows.append({**row, "routed": routed}),
                on_routed=lambda loop, counts: routed.extend(counts),
            )
        ],
        restart_clock=lambda: None,
        finished=True,
        stage=None,
    )
    sets = [EvaluationSet(name, weight, cast(Any, name)) for name, weight in weights.items()]
    Evaluation(sets, None, [0]).on_step_end(cast(Any, loop))
    (row,) = rows
    return row


@pytest.mark.parametrize("written", [-1, "often", "0 samples", "0%"])
def test_a_value_that_is_no_length_is_refused(written: str | int) -> None:
    (problem,) = TrainerConfig(steps=1, eval_every=written).problems()
    assert isinstance(problem, Problem) and "0 for never" in problem.fix


@pytest.mark.parametrize("written", [0, 5, "4k samples", 0.1, "5%"])
def test_lengths_are_taken(written: str | float) -> None:
    assert not list(TrainerConfig(steps=1, eval_every=written).problems())
