"""Runs in stages: each border is a resume, and a stop anywhere, with another layout after it, changes no loss."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from meshloom.checkpoint.restore import read_state
from meshloom.trainer import run as run_module
from meshloom.trainer.resolve import ResolvedRun
from meshloom.trainer.stages.record import StageRecord
from support.configs import resolve_words
from support.ranks import run_ranks
from support.tiny_run import TINY, body, unpicklable_run

STAGES = (
    "stages={base: {tokens: 500}, long: {tokens: 700, data: {seq_len: 32}, model: {rope_theta: 50000}},"
    " anneal: {tokens: 600, schedule: {name: linear, warmup: 0}, batch: {samples: 4}, optim: {lr: 0.002}}}"
)
WORDS = ["trainer.steps=null", "checkpoint.every=3", "optim.lr=0.003", STAGES]


def go(ranks: int, folder: Path, *overrides: str) -> None:
    assert run_ranks(ranks, body, [f"output_dir={folder}", *WORDS, *overrides]) == [0] * ranks


def rows(folder: Path, key: str) -> dict[int, Any]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[key] for line in lines if key in line}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run through all stages, on one process."""
    folder = tmp_path_factory.mktemp("whole")
    go(1, folder)
    return folder


def test_the_step_that_reaches_a_border_ends_its_stage(whole: Path) -> None:
    assert rows(whole, "stage") == {step: "base" if step <= 4 else "long" if step <= 7 else "anneal" for step in range(1, 13)}
    assert list(rows(whole, "tokens").values())[3::3] == [512, 1280, 1664]
    assert set(rows(whole, "eval_loss")) == {4, 7, 8, 12}, "each stage is evaluated at its end"
    state = read_state(whole / "checkpoints")
    assert state["stages"]["begun"] == [["base", 0, 0, 0, 0], ["long", 4, 32, 512, 8], ["anneal", 7, 56, 1280, 8]]
    assert sorted(state["stages"]["read"].values()) == [[32], [44]], "two sources: sequences of 16 and of 32"


def test_a_schedule_spans_the_stages_up_to_the_next_one_named(whole: Path) -> None:
    """The warm-up of two steps goes on from stage to stage; the line falls over the tokens that are left of the last stage."""
    left = 1800 - 1280
    line = [0.002 * (1 - 4 * 32 * step / left) for step in range(5)]
    assert list(rows(whole, "lr").values()) == pytest.approx([0.0015, *[0.003] * 6, *line], rel=1e-12)


@pytest.mark.parametrize(("first", "ranks"), [(7, 1), (9, 2)])
def test_a_stop_near_a_border_changes_no_loss(whole: Path, tmp_path: Path, first: int, ranks: int) -> None:
    """Stopped at a border and behind one; resumed on another number of processes, under another ZeRO stage."""
    stop = f"trainer.hooks=[{{_target_:support.run_hooks.Signal,step:{first},rank:0,name:SIGTERM}}]"
    go(3 - ranks, tmp_path, stop)
    stopped = rows(tmp_path, "loss")
    assert max(stopped) < 12
    go(ranks, tmp_path, "resume=auto", "trainer.hooks=[]", "parallel.zero=3")
    for key in ("loss", "lr", "eval_loss"):
        assert rows(tmp_path, key) == pytest.approx(rows(whole, key), rel=1e-9)
    assert rows(tmp_path, "stage") == rows(whole, "stage")
    assert read_state(tmp_path / "checkpoints")["stages"] == read_state(whole / "checkpoints")["stages"]


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["stages={}", "trainer.tokens=3000"], "stages"),
        (["stages.base.tokens=400"], "stages.base.tokens"),
        (["stages.more.tokens=400"], None),
    ],
)
def test_a_resume_keeps_the_stages_that_are_over(whole: Path, words: list[str], key: str | None) -> None:
    found = resolve_words(TINY, [f"output_dir={whole}", "resume=auto", *words])
    assert [problem.key for problem in found.problems] == ([] if key is None else [key]), found.problems


def test_a_stage_may_have_a_layout_of_its_own(whole: Path, tmp_path: Path) -> None:
    words = ["stages.long.parallel.tp=2", "stages.anneal.parallel={tp: 1, zero: 3}"]
    assert run_ranks(2, unpicklable_run, [f"output_dir={tmp_path}", *WORDS, *words]) == [0, 0]
    assert rows(tmp_path, "loss") == pytest.approx(rows(whole, "loss"), rel=1e-9)


def test_named_sets_are_evaluated_apart_in_every_stage(tmp_path: Path) -> None:
    (tmp_path / "wiki.txt").write_text("the quick brown fox jumps over the lazy dog. " * 20)
    words = [
        *("data=text", f"data.input={tmp_path}/wiki.txt", "data.tokenizer=bytes", "data.seq_len=16", "data.validation=0.1"),
        f"data.cache_dir={tmp_path}/cache",
        f"validation={{wiki: {{_target_: meshloom.data.nodes.Text, input: {tmp_path}/wiki.txt}}}}",
    ]
    assert run_ranks(1, body, [f"output_dir={tmp_path}/run", *WORDS, *words]) == [0]
    found = rows(tmp_path / "run", "validation/wiki/loss")
    assert set(found) == {4, 7, 8, 12} and 0 < found[12] < found[4]
    assert rows(tmp_path / "run", "eval_loss").keys() == found.keys()


def signalled_at_the_border(rank: int, world_size: int, words: list[str]) -> int:
    plain = run_module.read_record

    def read_record(run: ResolvedRun) -> StageRecord:
        os.kill(os.getpid(), signal.SIGTERM)
        return plain(run)

    run_module.read_record = read_record  # the process ends with this
    return body(rank, world_size, words)


def test_a_stage_that_is_over_is_skipped_and_a_border_obeys(tmp_path: Path) -> None:
    """The step that ends `base` at 512 tokens goes past the end of `short`, at 510. A signal there stops before `last`."""
    stages = "stages={base: {tokens: 500}, short: {tokens: 10, data: {seq_len: 32}}, last: {tokens: 300}}"
    words = [f"output_dir={tmp_path}", *WORDS[:-1], "trainer.eval_every=null", stages]
    assert run_ranks(1, signalled_at_the_border, words) == [0]
    assert max(rows(tmp_path, "stage")) == 4
    assert run_ranks(1, body, [*words, "resume=auto"]) == [0]
    assert [stage for step, stage in rows(tmp_path, "stage").items() if step > 4] == ["last", "last"]
    state = read_state(tmp_path / "checkpoints")
    assert state["stages"]["begun"] == [["base", 0, 0, 0, 0], *([name, 4, 32, 512, 8] for name in ("short", "last"))]


def test_a_run_without_stages_states_what_it_read_of_each_source(tmp_path: Path) -> None:
    """A stage that changes the weights, given to the finished run, repeats nothing."""
    for name in ("few", "many"):
        (tmp_path / f"{name}.txt").write_text(f"the quick brown {name} jumps over the lazy dog. " * 50)
    sources = ", ".join(
        f"{name}: {{_target_: meshloom.data.nodes.Text, input: {tmp_path}/{name}.txt}}" for name in ("few", "many")
    )
    words = [
        *("data=mixture", f"data.sources={{{sources}}}", "data.weights={few: 1, many: 3}", "data.tokenizer=bytes"),
        *("data.seq_len=16", "trainer.eval_every=0", f"data.cache_dir={tmp_path}/cache", f"output_dir={tmp_path}/run"),
    ]
    assert run_ranks(1, body, [*words, "trainer.steps=3"]) == [0]
    plain = read_state(tmp_path / "run/checkpoints")["stages"]
    assert plain["begun"] == [] and [source.split()[0] for source in plain["read"]] == ["/few", "/many"]
    more = "stages={base: {tokens: 384}, more: {tokens: 128, data: {weights: {few: 1, many: 1}}}}"
    assert run_ranks(1, body, [*words, "resume=auto", "trainer.steps=null", more]) == [0]
    assert read_state(tmp_path / "run/checkpoints")["stages"]["read_before"] == plain["read"]
