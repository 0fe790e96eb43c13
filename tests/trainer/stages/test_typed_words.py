"""Words typed at a run's first start hold for its later stages after a stop, too."""

from __future__ import annotations

from pathlib import Path

import pytest

from meshloom.checkpoint.restore import read_state
from meshloom.trainer.resolve import ResolvedRun
from meshloom.trainer.stages.typed_words import held_words
from support.configs import resolve_words
from support.ranks import run_ranks
from support.tiny_run import TINY, body

STAGES = (
    "stages={base: {tokens: 500}, fall: {tokens: 500, schedule: linear},"
    " wave: {tokens: 500, schedule: {name: cosine, warmup: 1}},"
    " end: {tokens: 500, schedule: linear, data: {seq_len: 32}}}"
)
RUN = ["trainer.steps=null", "trainer.eval_every=0", "checkpoint.every=2", STAGES]
FIRST = ["schedule=wsd", "schedule.decay=0", "schedule.final=0.25", "schedule.warmup=1", "optim.fused=false"]


def schedules(run: ResolvedRun) -> dict[str, object]:
    assert run.problems == ()
    return {one.place.stage.name: one.config.schedule for one in (run, *run.then) if one.place is not None}


@pytest.fixture(scope="module")
def first() -> dict[str, object]:
    """The schedule of each stage at the first start."""
    return schedules(resolve_words([*TINY, *RUN], FIRST))


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A run that stopped in its first stage, and went on into the third without what was typed."""
    folder, found = tmp_path_factory.mktemp("stopped"), list[Path]()
    for step, words in ((1, FIRST), (9, ["resume=auto"])):
        stop = f"trainer.hooks=[{{_target_:support.run_hooks.Signal,step:{step},rank:0,name:SIGTERM}}]"
        assert run_ranks(1, body, [f"output_dir={folder}", *RUN, *words, stop]) == [0]
        found.append(max((folder / "checkpoints").glob("step-*")))
    return found


def resumed(checkpoint: Path, *words: str) -> ResolvedRun:
    return resolve_words(TINY, [f"output_dir={checkpoint.parent.parent}", f"resume={checkpoint}", "trainer.hooks=[]", *words])


@pytest.mark.parametrize(("number", "stage"), [(0, "base"), (1, "wave")])
def test_typed_words_hold_for_later_stages_after_a_stop(
    first: dict[str, object], stopped: list[Path], number: int, stage: str
) -> None:
    """Also where an option of their group was chosen in between, that of the stage in which the run stopped among them."""
    run = resumed(stopped[number])
    now = schedules(run)
    assert next(iter(now)) == stage and now == {name: first[name] for name in now}
    assert [text for text in run.notices if "held" in text] == [
        "typed at an earlier start, and held for the options that stages choose:"
        " schedule=wsd schedule.decay=0 schedule.final=0.25 schedule.warmup=1"
    ]


def test_a_word_typed_at_the_resume_holds_over_the_first_one(stopped: list[Path]) -> None:
    run = resumed(stopped[0], "schedule=wsd", "schedule.final=0.125")
    finals = {name: vars(schedule)["final"] for name, schedule in schedules(run).items()}
    assert finals == {"base": 0.125, "fall": 0.125, "wave": 0.125, "end": 0.125}
    assert [word for word in run.typed if word.startswith("schedule.final")] == ["schedule.final=0.125"]


def test_a_word_without_meaning_for_an_option_is_left_out_and_told() -> None:
    told = "schedule.decay is left out, because schedule=linear has no such key"
    run = resolve_words([*TINY, *RUN], FIRST)
    assert [text for text in run.notices if "linear" in text] == [f"stages.fall: {told}", f"stages.end: {told}"]


def test_only_recipe_words_without_classes_are_kept(stopped: list[Path]) -> None:
    state = read_state(stopped[1])
    choice, *values = kept = FIRST[:-1]
    assert state["typed"] == kept
    assert held_words(state, ["schedule.decay=1"]) == [choice, *values[1:]]
    assert held_words(state, [choice]) == held_words(state, ["schedule=cosine"]) == values, "typed earlier; the checkpoint's"
    assert held_words(state, ["schedule=constant"]) == [], "another option begins without them"
    odd = ["optim._target_=os.system", "data.tokenizer=${oc.env:HOME}", "optim.lr=[1", "optim.lr=1"]
    assert held_words({**state, "typed": odd}, []) == ["optim.lr=1"], "whatever a checkpoint's text says"
