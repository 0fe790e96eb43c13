"""The config of each stage, and what is wrong with a stage's changes, all found before the start, by key."""

from __future__ import annotations

import json

import pytest

from meshloom.config.problems import ConfigError
from meshloom.trainer.resolve import ResolveOptions, resolve
from meshloom.trainer.run import prepared_stages
from support.configs import resolve_words
from support.tiny_run import TINY

RECIPE = [*TINY, "trainer.steps=null", "stages={a: {tokens: 500}, b: {tokens: 500}, c: {tokens: 500}}"]


def problems(*words: str) -> dict[str, str]:
    return {problem.key: str(problem) for problem in resolve_words(RECIPE, list(words)).problems}


def test_changes_add_up_and_what_is_typed_is_their_base() -> None:
    words = ["optim.lr=0.5", "stages.b.data.seq_len=32", "stages.b.optim.lr=0.2", "stages.c.schedule={name: linear, warmup: 0}"]
    words.append("stages.b.trainer.activation=full")
    found = resolve_words(RECIPE, words)
    assert found.problems == ()
    runs = [found, *found.then]
    assert [run.config.data.seq_len for run in runs] == [16, 32, 32]
    assert [run.config.trainer.activation for run in runs] == ["none", "full", "full"], "placement, too"
    assert [run.config.optim.lr for run in runs] == [0.5, 0.2, 0.2]
    assert [run.config.schedule.name for run in runs] == ["constant", "constant", "linear"]
    assert {run.config.trainer.tokens for run in runs} == {1500} and {run.config.trainer.steps for run in runs} == {None}
    assert found.then[1].choices["schedule"] == "linear"


def test_typed_value_that_the_first_stage_sets_is_told() -> None:
    found = resolve_words(RECIPE, ["stages.a.optim.lr=0.1", "optim.lr=0.5"])
    assert found.config.optim.lr == 0.1
    assert [text for text in found.notices if "optim.lr" in text] == [
        "optim.lr=0.1 of stage 'a' stands over what is typed; stages.a.optim.lr=… changes it"
    ]


WRONG = {
    "stages.b.optim.lrr=1": ("stages.b.optim.lrr", "did you mean optim.lr?"),
    "stages.b.schedule={name: linear, decay: 5, warmup: 0}": ("stages.b.schedule.decay", "has no such key"),
    "stages.b.model.dim=32": ("stages.b.model.dim", "can't change in the middle of a run"),
    "stages.b.model.vocabulary=99": ("stages.b.model.vocabulary", "can't change"),
    "stages.b.batch.samples=0": ("stages.b.batch.samples", "use 1 or more"),
    "stages.b.precision=fp32": ("stages.b.precision", "of the whole run"),
    "stages.c.optim=lamb": ("stages.c.optim", "means nothing to LAMB"),
    "checkpoint.every=0": ("checkpoint.every", "each stage begins from the checkpoint"),
    "trainer.steps=7": ("trainer.steps", "second length"),
}


def test_wrong_stages_are_refused_by_key_at_once() -> None:
    found = problems(*WRONG)
    assert set(found) == {key for key, _ in WRONG.values()}, found
    for key, said in WRONG.values():
        assert said in found[key]


def test_a_stage_is_refused_by_name() -> None:
    assert next(iter(problems("stages.d.data.seq_len=7"))) == "stages.d.tokens"
    found = problems("stages.b.schedule=wds", "stages.b.parallel.tp=3")
    assert "did you mean schedule=wsd?" in found["stages.b.schedule"]
    assert "does not divide 1 processes" in found["stages.b.parallel"] or "nearest" in found["stages.b.parallel"]


def test_a_word_that_cannot_be_read_is_a_problem_beside_stages_too() -> None:
    found = resolve(["recipe=three_stages", "optim.lr=[", "stages.long.optim.lr=-1"], ResolveOptions(lambda _: 1))
    assert [problem.key for problem in found.problems] == ["optim.lr=[", "stages.long.optim.lr"]


def test_problems_of_a_stages_data_name_the_stage() -> None:
    odd = "stages.b.validation={odd: {_target_: meshloom.data.synthetic.Synthetic, vocabulary: 99, validation_samples: 4}}"
    found = resolve_words(RECIPE, [odd])
    assert found.problems == ()
    with pytest.raises(ConfigError) as refused:
        prepared_stages(found)
    assert [problem.key for problem in refused.value.problems] == ["stages.b.validation.odd"]


def test_a_problem_of_the_base_is_told_once() -> None:
    assert list(problems("optim.lr=-1")) == ["optim.lr"]


def test_stages_keep_their_order_in_a_checkpoint() -> None:
    """The state is JSON, and the order of its keys is kept: that of stages, and that of a mixture's sources."""
    from meshloom.checkpoint.manifest import Manifest

    state = {"config": {"stages": {"b": {"tokens": 1}, "a": {"tokens": 2}}}}
    decoded = Manifest.decode(Manifest(1, 1, state, [], {}).encode(), "here")
    assert json.dumps(decoded.state) == json.dumps(state)
