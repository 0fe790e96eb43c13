"""Stages as a recipe writes them: lengths, changes as words of the command line, and what is refused by key."""

from __future__ import annotations

from typing import Any

import pytest

from meshloom.trainer.stages.written import read_stages, stage_table

STAGES = {
    "base": {"tokens": "8B"},
    "long": {"tokens": 1_000_000_000, "data": {"seq_len": 65536}, "model.rope_theta": 8e6},
    "anneal": {"tokens": "5e8 tokens", "schedule": {"name": "linear", "warmup": 0}, "optim": {"betas": [0.9, 0.95]}},
}


def test_lengths_add_up_and_changes_are_words() -> None:
    stages, problems = read_stages(STAGES)
    assert problems == []
    assert [(stage.name, stage.begin, stage.end) for stage in stages] == [
        ("base", 0, 8 * 10**9),
        ("long", 8 * 10**9, 9 * 10**9),
        ("anneal", 9 * 10**9, 9_500_000_000),
    ]
    assert stages[1].words == ["data.seq_len=65536", "model.rope_theta=8000000.0"]
    assert stages[2].words == ["schedule=linear", "schedule.warmup=0", "optim.betas=[0.9,0.95]"]
    assert stages[2].names("schedule") and not stages[2].names("sched") and not stages[1].names("optim")
    assert read_stages({}) == ([], [])


def test_a_value_reads_back_as_it_was_written() -> None:
    from meshloom.trainer.resumed_config import typed_values

    values: dict[str, Any] = {"a": "x, y: 'z'", "b": None, "c": "null", "d": True, "e": 1e-7, "f": [1, "two words"], "g": {}}
    values |= {"h": "1e-3", "i": "12", "j": "nan", "k": "1_000", "l": "012", "m": "1.2.3"}  # texts that look like numbers
    (stage,), _ = read_stages({"one": {"tokens": 1, "trainer": values}})
    assert typed_values(stage.words) == {f"trainer.{name}": value for name, value in values.items()}


@pytest.mark.parametrize(
    ("written", "key", "said"),
    [
        ({"a": {}}, "stages.a.tokens", "has no length"),
        ({"a": {"tokens": 0}}, "stages.a.tokens", "no whole number of tokens"),
        ({"a": {"tokens": "10 steps"}}, "stages.a.tokens", "no number of tokens"),
        ({"a": {"tokens": "10%"}}, "stages.a.tokens", "no number of tokens"),
        ({"a": {"tokens": True}}, "stages.a.tokens", "no number of tokens"),
        ({"a": 5}, "stages.a", "no stage"),
        ({"1 st": {"tokens": 5}}, "stages.1 st", "no name"),
        ([{"name": "a"}], "stages", "no mapping"),
        ({"a": {"tokens": 5, "seed": 2}}, "stages.a.seed", "of the whole run"),
        ({"a": {"tokens": 5, "trainer": {"steps": 2}}}, "stages.a.trainer.steps", "of the whole run"),
        ({"a": {"tokens": 5, "launch": {"nproc": 2}}}, "stages.a.launch.nproc", "of the whole run"),
    ],
)
def test_a_value_that_is_no_stage_is_refused_by_key(written: Any, key: str, said: str) -> None:
    _, (problem,) = read_stages(written)
    assert problem.key == key and said in problem.message and problem.fix


def test_the_table_marks_the_stage_that_the_run_is_in() -> None:
    lines = list(stage_table(read_stages(STAGES)[0], 1))
    assert lines[0] == "3 stages, 9,500,000,000 tokens:"
    assert [line[0] for line in lines[1:]] == [" ", ">", " "]
    assert lines[2].split() == [
        *([">", "long", "1,000,000,000", "tokens,", "to", "9,000,000,000"]),
        "data.seq_len=65536",
        "model.rope_theta=8000000.0",
    ]
