"""The bench of runs under fire: its schedules, what an injected fault does, and how a run is judged."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from meshloom.benchmarks.fire.faults import KINDS, LAYOUTS, SEVERAL_MACHINES, Fault, Schedule, draw, every_phase, read_faults
from meshloom.benchmarks.fire.injector import fired_file, flip_bit
from meshloom.benchmarks.fire.report import report
from meshloom.benchmarks.fire.rows import Result, from_row, to_row
from meshloom.benchmarks.fire.verdict import judge
from meshloom.trainer.watch.incidents import read_incidents
from support.ranks import run_ranks
from support.tiny_run import body


def test_a_seed_and_a_number_give_the_same_schedule() -> None:
    drawn = [draw(3, number) for number in range(200)]
    assert drawn == [draw(3, number) for number in range(200)] != [draw(4, number) for number in range(200)]
    assert {fault.kind for schedule in drawn for fault in schedule.faults} == set(KINDS)
    assert {schedule.layout for schedule in drawn} == {*LAYOUTS, *SEVERAL_MACHINES}
    for schedule in drawn:
        steps = [fault.step for fault in schedule.faults]
        assert steps == sorted(set(steps)) and steps[0] > 3 and steps[-1] < schedule.steps
        assert all(fault.rank < schedule.layout.ranks for fault in schedule.faults)


def test_faults_are_read_as_they_were_written(tmp_path: Path) -> None:
    schedule = draw(1, 4)
    schedule.write(tmp_path / "faults.json")
    assert read_faults(tmp_path / "faults.json") == list(schedule.faults)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_flip_changes_one_bit_of_one_element(dtype: torch.dtype) -> None:
    before = torch.randn(5, 7).to(dtype)
    for seed in range(100):
        after = before.clone()
        told = flip_bit(after, random.Random(seed))
        changed = after.view(torch.uint8) ^ before.view(torch.uint8)
        assert sum(int(byte).bit_count() for byte in changed.view(-1)) == 1
        assert not torch.equal(
            after.view(torch.uint8).view(35, -1)[told["element"]], before.view(torch.uint8).view(35, -1)[told["element"]]
        )


SAME = {1: 4.0, 2: 3.0}


def left(kind: str, incidents: list[dict[str, Any]], losses: dict[int, float] | None = None) -> Result:
    """A run in which a fault of this kind struck rank 1 at second 10."""
    schedule = Schedule(0, LAYOUTS[7], (Fault(kind, 1, 2),))
    return Result(schedule, [0], losses or SAME, SAME, {0: {"time": 10.0}}, incidents, step_seconds=0.1)


def incident(kind: str, rank: int | None, time: float = 12.5, **details: Any) -> dict[str, Any]:
    return {"kind": kind, "rank": rank, "time": time, "message": f"{kind} of {rank}", "details": details}


@pytest.mark.parametrize(("kind", "code", "open_end"), [("kill", 77, True), ("kill", 76, False), ("kill_again", 76, True)])
def test_ranks_that_may_end_before_the_last_step(kind: str, code: int, open_end: bool) -> None:
    run = left(kind, [incident("death", 1)], {1: SAME[1]})
    run.codes = [code]
    assert judge(run).open_end is judge(run).same is open_end


@pytest.mark.parametrize(
    ("kind", "incidents", "noticed", "wrong"),
    [
        ("stop", [incident("hang", 1)], True, 0),
        ("stop", [incident("silence", 2), incident("hang", 1)], True, 1),
        ("stop", [incident("hang", 0)], False, 1),
        ("kill", [incident("hang", 1)], False, 1),
        ("kill", [incident("death", 1, time=9.0)], False, 1),
        ("flip_weight", [incident("replicas_differ", 1, odd=[1])], True, 0),
        ("flip_weight", [incident("replicas_differ", None, odd=[0, 1, 2]), incident("replicas_judged", 0, wrong=[0])], True, 1),
        ("spike", [incident("bad_step", None)], True, 0),
        ("clock", [incident("hang", 0)], False, 1),
        ("flip_gradient", [incident("replicas_differ", 1, odd=[1])], False, 1),
        ("full_disk", [incident("error", 0)], True, 0),
        ("full_disk", [incident("save_failed", None)], True, 0),
        ("bad_sample", [incident("bad_step", 2, samples=[])], True, 0),
        ("kill_node", [incident("node_lost", None)], True, 0),
        ("kill_node", [incident("death", 0)], False, 1),
        (
            "kill_again",
            [incident("death", 1, said="starting again"), incident("death", 1, said="so not started again")],
            True,
            0,
        ),
        ("kill_again", [incident("death", 1, said="starting again")], False, 0),
    ],
)
def test_a_run_is_judged(kind: str, incidents: list[dict[str, Any]], noticed: bool, wrong: int) -> None:
    verdict = judge(left(kind, incidents))
    assert (verdict.noticed == {0: 2.5}) is noticed and len(verdict.wrong) == wrong
    assert verdict.missed == ([] if noticed or kind == "clock" else [0]) and verdict.same


def test_an_incident_notices_one_fault() -> None:
    for kind, by, noticed in (
        ("kill", incident("death", 1), {1: 1.5}),
        ("flip_weight", incident("replicas_differ", 1, odd=[1]), {0: 2.5, 1: 1.5}),  # all since the comparison before
    ):
        run = left(kind, [by])
        run.schedule = Schedule(0, LAYOUTS[7], (Fault(kind, 1, 2), Fault(kind, 1, 3), Fault(kind, 1, 9)))
        run.fired = {0: {"time": 10.0}, 1: {"time": 11.0}, 2: {"time": 20.0}}
        verdict = judge(run)
        assert verdict.noticed == noticed and verdict.missed == [number for number in range(3) if number not in noticed]


def test_a_slow_rank_that_no_fault_has_slowed_is_not_counted_as_wrong() -> None:
    verdict = judge(left("kill", [incident("straggler", 0), incident("death", 1)]))
    assert verdict.slowed == ["straggler of 0"] and verdict.wrong == []


@pytest.mark.parametrize(
    ("losses", "worst"), [({1: 4.0, 2: 3.0 + 3e-6}, 1e-6), ({1: 4.0}, math.inf), ({1: 4.0, 2: math.nan}, math.inf)]
)
def test_losses_are_held_to_the_undisturbed_ones(losses: dict[int, float], worst: float) -> None:
    verdict = judge(left("clock", [], losses))
    assert verdict.worst == pytest.approx(worst) and not verdict.same


def test_the_table_counts_faults_by_kind() -> None:
    run = left("flip_weight", [incident("replicas_differ", 1, odd=[1])])
    run.fired[0]["copies"] = 3
    missed = left("flip_weight", [], {1: 4.0, 2: 3.1})
    missed.fired[0]["copies"] = 3
    stopped = left("stop", [])
    stopped.fired[0]["phase"] = "save"
    text = report([from_row(json.loads(json.dumps(to_row(each)))) for each in (run, run, missed, stopped)])
    assert "| flip_weight, copied | 3 | 2 | 2.5 s | 2.5 s | 2 |" in text and "4 runs, 4 faults" in text
    assert "not noticed, and changed losses: 1" in text and "not noticed, apart from flips: 1 [('stop in save', 0)]" in text
    assert "3 usual steps + 5 s: 0 of 1" in text and "and no missed flip to explain them: 0 []" in text


def test_times_of_a_rank_whose_clock_was_set_are_told_apart() -> None:
    faults = (Fault("clock", 0, 2, size=5.0), Fault("nan_activation", 1, 3))
    fired = {0: {"time": 10.0}, 1: {"time": 11.0}}
    run = Result(Schedule(0, LAYOUTS[7], faults), [0], SAME, SAME, fired, [incident("bad_step", 1, time=12.0 + 5 * 3600)])
    assert judge(run).noticed == {1: 1.0}


def test_every_phase_is_struck_on_all_layouts() -> None:
    schedules = list(every_phase(4))
    assert {each.faults[0].phase for each in schedules} >= {"data", "forward", "backward", "exchange", "update", "save"}
    assert {each.layout for each in schedules} == set(LAYOUTS)


def test_an_injected_fault_strikes_once_and_costs_no_loss(tmp_path: Path) -> None:
    """A number that is not finite, once, is a passing fault: the step is taken again. The clock that jumps changes nothing."""
    faults = (Fault("nan_activation", 1, 3), Fault("clock", 0, 4, size=5.0))
    Schedule(0, LAYOUTS[0], faults).write(tmp_path / "faults.json")
    hook = f"trainer.hooks=[{{_target_: meshloom.benchmarks.fire.injector.Injector, folder: '{tmp_path}'}}]"
    words = ["trainer.steps=6", "checkpoint.every=0", "trainer.eval_every=0", "parallel.zero=0"]
    losses: list[list[float]] = []
    for ranks, name, more in ((1, "undisturbed", []), (2, "fire", [hook])):
        assert run_ranks(ranks, body, [*words, *more, f"output_dir={tmp_path / name}"]) == [0] * ranks
        rows = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        losses.append([row["loss"] for row in rows if "loss" in row])
    assert losses[1] == pytest.approx(losses[0], rel=1e-9) and len(losses[1]) == 6
    (found,) = read_incidents(tmp_path / "fire")
    assert (found["kind"], found["rank"], found["step"]) == ("bad_step", 1, 3)
    assert json.loads(fired_file(tmp_path, 0).read_text())["phase"] == "forward"
    assert json.loads(fired_file(tmp_path, 1).read_text())["phase"] == "data"
