"""The config of a run that goes on: recipe and habits of its checkpoint, placement of today, and what is typed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from omegaconf import OmegaConf

from meshloom.checkpoint.manifest import state_fault
from meshloom.config.compose import Composer, Composition
from meshloom.data.version import NEWEST
from meshloom.trainer.resumed_config import Resumed, resume_config, saved_choices, saved_config
from meshloom.trainer.schema import RunConfig, make_composer
from meshloom.trainer.typed import plain_config, typed_config


@pytest.fixture(scope="module")
def composer() -> Composer:
    return make_composer()


def saved_run(composer: Composer, *overrides: str) -> dict[str, Any]:
    named = any(line.startswith("recipe=") for line in overrides)
    composition = composer.compose([*([] if named else ["recipe=quickstart"]), *overrides])
    assert composition.problems == []
    return plain_config(typed_config(composition.config)[0])


def record(composer: Composer, *overrides: str) -> tuple[dict[str, Any], dict[str, str]]:
    """The config and the choices that a run of these words states in its checkpoints."""
    composition = composer.compose(["recipe=quickstart", *overrides])
    return plain_config(typed_config(composition.config)[0]), composition.choices


def resume_recorded(composer: Composer, saved: tuple[dict[str, Any], dict[str, str]], *words: str) -> Resumed:
    """The resume of a run whose checkpoints state its choices."""
    choices = saved_choices(*saved, composer.compose(words).config, words, composer.has_option)
    fresh = composer.compose([*choices, *words])
    assert fresh.problems == []
    return resume_config(saved[0], fresh, words, saved[1])


def resumed(
    composer: Composer, saved: dict[str, Any], words: Sequence[str], recipe: Sequence[str] = ()
) -> tuple[RunConfig, list[str]]:
    """The config of a run that goes on with these words, and what is said. recipe: words that stand for a recipe file."""
    today = composer.compose([*recipe, *words]).config
    choices = saved_choices(saved, {}, today, words, composer.has_option)
    fresh = composer.compose([*choices, *recipe, *words])
    assert fresh.problems == []
    found = resume_config(saved, fresh, words)
    return typed_config(found.config)[0], found.notices


def test_recipe_is_the_checkpoints_and_placement_todays(composer: Composer) -> None:
    saved = saved_run(composer, "optim.lr=0.5", "batch.samples=64", "parallel.tp=2", "launch.nproc=2", "output_dir=there")
    config, told = resumed(composer, saved, ["recipe=quickstart", "trainer.steps=400", "resume=auto", "parallel.cp=2"])
    assert config.optim.lr == 0.5 and config.batch.samples == 64
    assert config.trainer.steps == 400
    assert (config.parallel.tp, config.parallel.cp) == (1, 2)
    assert config.launch.nproc == "auto" and config.output_dir == "outputs/quickstart" and config.resume == "auto"
    assert "changed recipe: trainer.steps=400 (was 200)" in told
    assert "changed placement: parallel.tp=1 (was 2), parallel.cp=2 (was 1), launch.nproc=auto (was 2)" in told
    kept = (
        "kept from the checkpoint, where the recipe files of today differ: optim.lr=0.5 (now 0.003), batch.samples=64 (now 32)"
    )
    assert kept in told and len(told) == 3


def test_placement_comes_from_the_file_of_the_runs_own_recipe(composer: Composer) -> None:
    saved = saved_run(composer, "recipe=llama_8b")
    config, told = resumed(composer, saved, ["resume=auto", "output_dir=big"])
    assert config.recipe == "llama_8b" and config.batch.micro == "auto"
    assert config.trainer.activation == "auto" and config.trainer.compile
    assert not any("trainer.activation" in line or "recipe=" in line for line in told)


def test_habits_stay_until_another_is_typed(composer: Composer) -> None:
    saved = saved_run(composer, "checkpoint.keep=0", "logging.every=5", "trainer.sample_prompt=null")
    config, told = resumed(composer, saved, ["resume=auto", "logging.every=2"])
    assert config.checkpoint.keep == 0 and config.logging.every == 2 and config.trainer.sample_prompt is None
    assert any("kept from the checkpoint" in line and "checkpoint.keep=0 (now 3)" in line for line in told)


def test_placement_comes_from_todays_recipe_file_too(composer: Composer) -> None:
    saved = saved_run(composer, "batch.micro=2")
    config, told = resumed(composer, saved, ["resume=auto"], recipe=["parallel.zero=1", "batch.micro=8"])
    assert config.parallel.zero == 1 and config.batch.micro == 8
    assert told == ["changed placement: batch.micro=8 (was 2), parallel.zero=1 (was 3)"]


@pytest.mark.parametrize("choice", [["batch=norm_test"], ["optim=agvm"], ["trainer.float8=tensorwise"]])
def test_micro_batches_are_recipe_where_they_are_measured(composer: Composer, choice: list[str]) -> None:
    config, told = resumed(composer, saved_run(composer, "batch.micro=2", *choice), ["resume=auto"])
    assert config.batch.micro == 2 and not any("placement" in line for line in told)
    config, _ = resumed(composer, saved_run(composer, "batch.micro=2", *choice), ["resume=auto", "batch.micro=1"])
    assert config.batch.micro == 1, "what is typed wins"


def test_todays_place_of_the_data_wins_and_else_the_checkpoints(composer: Composer) -> None:
    saved = saved_run(composer, "data=jsonl", "data.input=a.jsonl", "data.field=body")
    config, _ = resumed(composer, saved, ["resume=auto"])  # the recipe's data are others
    assert (config.data.name, config.data.input, config.data.field) == ("jsonl", "a.jsonl", "body")
    config, told = resumed(composer, saved, ["resume=auto"], recipe=["data=jsonl", "data.input=b.jsonl"])
    assert config.data.input == "b.jsonl" and config.data.field == "body"
    assert "changed placement: data.input=b.jsonl (was a.jsonl)" in told


def test_sources_of_a_mixture_may_move(composer: Composer) -> None:
    source = {"_target_": "meshloom.data.nodes.Jsonl", "name": "jsonl", "input": "a.jsonl", "field": "body"}
    saved = saved_run(composer, "data=mixture") | {}
    saved["data"] |= {"sources": {"code": source}, "weights": {"code": 1.0}}
    fresh = composer.compose(["data=mixture"]).config
    OmegaConf.update(fresh, "data.sources", {"code": {**source, "input": "b.jsonl", "field": "text"}}, force_add=True)
    config = typed_config(resume_config(saved, Composition(fresh, []), ["resume=auto"]).config)[0]
    assert config.data.sources["code"]["input"] == "b.jsonl" and config.data.sources["code"]["field"] == "body"


def test_repeating_a_choice_resets_nothing(composer: Composer) -> None:
    saved = saved_run(composer, "optim=lamb", "optim.lr=0.5", "optim.norm_max=3")
    config, _ = resumed(composer, saved, ["optim=lamb", "optim.weight_decay=0.3", "resume=auto"])
    assert (config.optim.lr, config.optim.norm_max, config.optim.weight_decay) == (0.5, 3, 0.3)


def test_another_choice_brings_its_whole_node(composer: Composer) -> None:
    saved = saved_run(composer, "schedule.warmup=7", "optim.lr=0.5")
    config, _ = resumed(composer, saved, ["schedule=power", "schedule.a=9", "resume=auto"])
    assert config.schedule.name == "power" and config.schedule.a == 9 and config.schedule.warmup == "5%"
    assert config.optim.lr == 0.5


def test_keys_are_those_of_the_run_that_goes_on(composer: Composer) -> None:
    """`optim.norm_max` is a key of the checkpoint's LAMB, though the recipe says AdamW."""
    saved = saved_run(composer, "optim=lamb")
    config, _ = resumed(composer, saved, ["optim.norm_max=3", "resume=auto"])
    assert config.optim.name == "lamb" and config.optim.norm_max == 3
    words = ["optim.fused=true", "resume=auto"]
    choices = saved_choices(saved, {}, composer.compose(words).config, words, composer.has_option)
    (problem,) = composer.compose([*choices, *words]).problems
    assert problem.key == "optim.fused" and "optim=lamb has no such key" in str(problem)


def test_another_recipe_is_taken_altogether(composer: Composer) -> None:
    saved = saved_run(composer, "optim.lr=0.5")
    config, told = resumed(composer, saved, ["recipe=llama_1b"])
    assert config.recipe == "llama_1b" and config.optim.lr == 1e-3
    assert (
        told[0] == "this run has the recipe llama_1b from now on (it was quickstart)" and "optim.lr=0.001 (was 0.5)" in told[1]
    )


def test_null_list_and_added_overrides(composer: Composer) -> None:
    saved = saved_run(composer)
    line = ["trainer.steps=null", "trainer.tokens=5000", "optim.betas=[0.8,0.9]", "parallel.deepspeed.config.x.y=1"]
    config, _ = resumed(composer, saved, line)
    assert config.trainer.steps is None and config.trainer.tokens == 5000
    assert config.optim.betas == [0.8, 0.9] and config.parallel.deepspeed.config == {"x": {"y": 1}}


def test_a_key_that_is_no_more_is_left_out(composer: Composer) -> None:
    saved = saved_run(composer)
    saved["bygone"] = {"a": 1}
    saved["trainer"]["bygone"] = saved["optim"]["bygone"] = 2
    config, told = resumed(composer, saved, ["trainer.steps=7"])
    assert config.trainer.steps == 7
    assert [line.split()[0] for line in told if "no key of this version" in line] == [
        "trainer.bygone",
        "bygone",
        "optim.bygone",
    ]


def test_key_that_the_checkpoint_lacks_has_its_default(composer: Composer) -> None:
    saved = saved_run(composer)
    del saved["optim"]["lr_coupling"], saved["trainer"]["max_grad_norm"]
    config, _ = resumed(composer, saved, ["resume=auto"])
    assert config.optim.lr_coupling == "none" and config.trainer.max_grad_norm == 1.0


@pytest.mark.parametrize(
    ("group", "option", "earlier"),
    [
        ("optim", "adamw", ("optim.weight_decay=0.5", "optim.betas=[0.8,0.9]")),
        ("batch", "norm_test", ("batch.eta=0.33", "batch.max=64", "batch.samples=16")),
        ("schedule", "cosine", ("schedule.final=0.25",)),
        ("model", "llama_tiny", ("model.dim=32", "model.rope_theta=10000")),
        ("data", "synthetic", ("data.vocabulary=61", "data.seq_len=32")),
    ],
)
def test_a_repeated_choice_keeps_all_that_was_typed(
    composer: Composer, group: str, option: str, earlier: tuple[str, ...]
) -> None:
    saved = record(composer, f"{group}={option}", *earlier)
    found = resume_recorded(composer, saved, f"{group}={option}", "resume=auto")
    assert plain_config(typed_config(found.config)[0])[group] == saved[0][group]
    (kept,) = [line for line in found.notices if line.startswith("kept")]
    assert all(word.partition("=")[0] in kept for word in earlier), "it is said"


def test_another_choice_says_what_it_drops_and_changes(composer: Composer) -> None:
    saved = record(composer, "optim=lamb", "optim.norm_max=3", "optim.lr=0.5")
    found = resume_recorded(composer, saved, "optim=lars", "resume=auto")
    assert any("optim=lars has no place for the checkpoint's" in line and "optim.norm_max=3" in line for line in found.notices)
    assert any("changed recipe" in line and "optim.lr=0.003 (was 0.5)" in line for line in found.notices)


def test_another_file_of_the_same_class_is_another_choice(composer: Composer) -> None:
    """All shapes of a model are of one class, and so may be recipes of an optimizer."""
    saved = record(composer, "model=llama_1b")
    found = resume_recorded(composer, saved, "model=llama_3b", "resume=auto")
    assert found.config.model.dim == 3072 and any(line.startswith("model.dim=3072 (was 2048)") for line in found.warnings)
    assert resume_recorded(composer, saved, "resume=auto").config.model.dim == 2048


@pytest.mark.parametrize("word", ["seed=2", "model.rope_theta=1e4", "model.norm_eps=1e-6", "data.seq_len=128"])
def test_a_change_that_may_be_a_mistake_is_a_warning(composer: Composer, word: str) -> None:
    found = resume_recorded(composer, record(composer), word, "resume=auto")
    (warning,) = found.warnings
    assert warning.startswith(f"{word.partition('=')[0]}=") and "(was" in warning
    assert resume_recorded(composer, record(composer, word), word, "resume=auto").warnings == []


def test_initial_weights_may_be_drawn_otherwise_without_a_warning(composer: Composer) -> None:
    found = resume_recorded(composer, record(composer), "model.init_std=0.01", "resume=auto")
    assert found.warnings == [] and "changed recipe: model.init_std=0.01 (was 0.02)" in found.notices


def test_caches_are_never_the_checkpoints(composer: Composer) -> None:
    saved = record(composer, "data=text", "data.input=/mine/a.txt", "data.cache_dir=/mine/cache")
    found = resume_recorded(composer, saved, "resume=auto")
    assert found.config.data.cache_dir is None and found.config.data.input == "/mine/a.txt"
    assert resume_recorded(composer, saved, "resume=auto", "data.cache_dir=/here").config.data.cache_dir == "/here"


@pytest.mark.parametrize("kind", ["stdlib", "mixture"])
def test_data_of_older_checkpoints_keep_their_rules(composer: Composer, kind: str) -> None:
    config, choices = record(composer, f"data={kind}")
    assert config["data"].pop("version") == NEWEST
    saved = saved_config({"config": config}), choices
    kept = resume_recorded(composer, saved, f"data={kind}", "resume=auto")
    assert kept.config.data.version == 1 and any(f"data.version=1 (now {NEWEST})" in line for line in kept.notices)
    typed = resume_recorded(composer, saved, "data.version=2", "resume=auto")
    assert typed.config.data.version == 2
    assert any("data.version=2 (was 1)" in line for line in [*typed.notices, *typed.warnings])
    other = resume_recorded(composer, saved, "data=synthetic", "resume=auto")
    assert other.config.data.name == "synthetic"


def test_keys_of_a_node_inside_a_group_are_kept(composer: Composer) -> None:
    saved = record(composer, "model.rope_scaling.kind=linear", "model.rope_scaling.factor=4")
    found = resume_recorded(composer, saved, "resume=auto")
    assert found.config.model.rope_scaling.kind == "linear" and found.config.model.rope_scaling.factor == 4
    assert not any("no key of this version" in line for line in found.notices)


CHAIN = (
    (),
    ("launch.nproc=2", "parallel.tp=2"),
    ("launch.nproc=2", "parallel.pp=2"),
    ("launch.nproc=2", "parallel.cp=2"),
    ("launch.nproc=2", "parallel.engine=deepspeed", "parallel.zero=2"),
    ("launch.nproc=3",),
    (),
)


def test_a_chain_of_resumes_has_each_days_layout_and_one_recipe(composer: Composer) -> None:
    """Each day types nothing but resume=auto and its layout; docs/resume.md trains this chain."""
    first = saved = record(composer, "optim.lr=0.5", "model.dim=32", "data=synthetic", "data.vocabulary=61")
    for number, layout in enumerate(CHAIN):
        found = resume_recorded(composer, saved, "resume=auto", *layout)
        config = typed_config(found.config)[0]
        today = typed_config(composer.compose(["recipe=quickstart", *layout]).config)[0]
        assert (config.parallel, config.launch) == (today.parallel, today.launch), f"day {number}"
        plain = plain_config(config)
        for group in ("model", "data", "optim", "schedule", "seed", "precision", "checkpoint"):
            assert plain[group] == first[0][group], f"day {number}"
        assert found.warnings == [] and not any("changed recipe" in line for line in found.notices)
        saved = (plain, found.choices)


def test_numbers_of_machines_survive_the_json_of_a_checkpoint(composer: Composer) -> None:
    words = ["launch.nodes=2:3", "launch.placements={2: ['parallel.pp=2']}"]
    state = {"config": saved_run(composer, *words)}
    assert state_fault(state) is None
    saved = saved_config(json.loads(json.dumps(state)))
    fresh = composer.compose(["recipe=quickstart", *words])
    resumed = resume_config(saved, fresh, words)
    assert typed_config(resumed.config)[0].launch.placements == {2: ["parallel.pp=2"]}
    assert not any("placements" in notice for notice in [*resumed.notices, *resumed.warnings])
    untyped = resume_config(saved, composer.compose(["recipe=quickstart"]), [])
    assert typed_config(untyped.config)[0].launch.placements == {}, "placement is today's"
