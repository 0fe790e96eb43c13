"""Composition: defaults, precedence, every fault at once, and the config of a resumed run."""

from __future__ import annotations

import functools
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hydra import initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from meshloom.config.compose import Composer
from meshloom.config.fixes import near_miss
from meshloom.config.overrides import quoted
from meshloom.config.problems import ConfigError
from meshloom.config.renames import RENAMED_KEYS, with_renamed_keys
from meshloom.config.sweeps import sweep_folder
from meshloom.trainer.schema import make_composer
from support.composing import CHOOSE, LOAD, MERGE, PARSE, share_compositions


@pytest.fixture(scope="module")
def composer() -> Composer:
    return make_composer()


def config_of(composer: Composer, *overrides: str) -> Any:
    composition = composer.compose(overrides)
    assert composition.problems == []
    return composition.config


SHAPES = {
    # dim, layers, heads, kv_heads, ffn_dim: the published Llama 3 shapes
    "llama_1b": (2048, 16, 32, 8, 8192),
    "llama_3b": (3072, 28, 24, 8, 8192),
    "llama_8b": (4096, 32, 32, 8, 14336),
    "llama_70b": (8192, 80, 64, 8, 28672),
}


@pytest.mark.parametrize("recipe", SHAPES)
def test_recipe_has_the_published_shape(composer: Composer, recipe: str) -> None:
    config = config_of(composer, f"recipe={recipe}")
    model = config.model
    assert (model.dim, model.layers, model.heads, model.kv_heads, model.ffn_dim) == SHAPES[recipe]
    assert model.vocabulary == 128_256 and not model.tied
    assert config.recipe == recipe and config.output_dir == f"outputs/{recipe}"


def test_command_line_wins_over_recipe_and_recipe_over_schema(composer: Composer) -> None:
    config = config_of(composer, "recipe=quickstart", "schedule=power", "optim.lr=0.5")
    assert config.schedule.name == "power"
    assert config.optim.lr == 0.5
    assert config.precision == "fp32"  # the recipe's; the schema says bf16
    assert config.schedule.warmup == "5%"  # what the recipe says of schedules holds for the chosen one


@pytest.mark.parametrize(
    "folder", ["runs/a", "it's, [here]: 1", "ends in \\", "a\\'b", 'say "a"', " b ", "null", "{a: 1}", "a=b"]
)
def test_a_quoted_text_is_read_back_as_it_was(composer: Composer, folder: str) -> None:
    assert config_of(composer, f"output_dir={quoted(folder)}").output_dir == folder


def test_every_fault_is_named_at_once_with_a_fix(composer: Composer) -> None:
    composition = composer.compose(
        [
            "recipe=quikstart",
            "optim.lrr=3",
            "parallel.zero=many",
            "trainer.step=4",
            "schedule=powr",
            "schedule.a=3",
            "no equals sign",
            "~trainer.steps",
            "optim.lr=1,2",
            "trainer.tokens=2 gigatokens",
            "checkpoint.every=2e3",
            "seed=7",
        ]
    )
    said = {problem.key: str(problem) for problem in composition.problems}
    assert set(said) == {
        "recipe",
        "optim.lrr",
        "parallel.zero",
        "trainer.step",
        "schedule",
        "no equals sign",
        "trainer.steps",
        "trainer.tokens",
        "checkpoint.every",
        "optim.lr",
    }
    assert "1.5M" in said["trainer.tokens"]
    assert "checkpoint.every=2_000" in said["checkpoint.every"]
    assert "recipe=quickstart" in said["recipe"]
    assert "optim.lr?" in said["optim.lrr"]
    assert "trainer.steps" in said["trainer.step"]
    assert "schedule=power" in said["schedule"]
    assert "-m" in said["optim.lr"]
    assert composition.config.seed == 7
    assert composition.config.schedule.a == 3  # judged under the schedule that was meant


@pytest.mark.parametrize(
    ("key", "fix"),
    [
        ("optim.lrr", "did you mean optim.lr?"),
        ("optim.steps", "did you mean trainer.steps?"),  # the right word in the wrong place
        ("optim.colour", "optim has: lr, betas"),
        ("trianer.steps", "did you mean trainer.steps?"),
        ("colour", "see `meshloom keys` for every key"),
    ],
)
def test_near_misses(key: str, fix: str) -> None:
    assert near_miss(key, ["optim", "optim.lr", "optim.betas", "trainer", "trainer.steps"]) == fix


def test_user_folder_joins_and_its_faults_name_the_file(tmp_path: Path) -> None:
    (tmp_path / "recipe").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("_target_: my.Model\nwidth: 3\n")
    (tmp_path / "recipe" / "good.yaml").write_text(
        "# @package _global_\ndefaults:\n  - /recipe/quickstart\n  - override /model: mine\n  - _self_\nrecipe: good\n"
    )
    (tmp_path / "recipe" / "bad.yaml").write_text("# @package _global_\nrecipe: bad\ntrainer:\n  step: 3\n")
    composer = make_composer(str(tmp_path))
    config = config_of(composer, "recipe=good")
    assert config.model == {"_target_": "my.Model", "width": 3} and config.recipe == "good" and config.trainer.steps == 200
    (problem,) = composer.compose(["recipe=bad"]).problems
    assert problem.key == "recipe=bad" and "trainer.step" in str(problem) and "recipe/bad.yaml" in str(problem)
    (tmp_path / "recipe" / "broken.yaml").write_text("# @package _global_\nrecipe: [broken\n")
    (problem,) = make_composer(str(tmp_path)).compose(["recipe=broken", "seed=3"]).problems
    assert problem.key == "recipe=broken" and "broken.yaml" in str(problem) and "line" in str(problem)
    with pytest.raises(ConfigError, match="--config-dir"):
        make_composer(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("name", ["it's", "a,b", "x=y", "[1]", "do${l}lar", "back\\slash", "trail\\", "quote\\'d"])
def test_user_folder_may_have_any_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name / "recipe").mkdir(parents=True)
    (tmp_path / name / "recipe" / "mine.yaml").write_text("# @package _global_\ndefaults: [quickstart, _self_]\nseed: 5\n")
    assert config_of(make_composer(str(tmp_path / name)), "recipe=mine").seed == 5


@pytest.mark.parametrize("word", ["trainer.tokens=1.5B", "++trainer.tokens='1.5B tokens'", "trainer.tokens=1.5e9"])
def test_a_run_may_be_as_long_as_one_says(composer: Composer, word: str) -> None:
    assert config_of(composer, "recipe=quickstart", word, "trainer.steps=2k").trainer.tokens == 1_500_000_000
    assert config_of(composer, "recipe=quickstart", word, "trainer.steps=2k").trainer.steps == 2000


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("trainer.tokens='8 samples'", "trainer.tokens: '8 samples' is no number of tokens; write it as 1500000 or 1.5M"),
        ("data.seq_len=1e3", "could not be converted to Integer; write a whole number in full: data.seq_len=1_000"),
        ("data.seq_len=8k", "could not be converted to Integer; write a whole number in full: data.seq_len=8_000"),
    ],
)
def test_a_count_that_is_none_is_told_how_to_write_one(composer: Composer, word: str, said: str) -> None:
    (problem,) = composer.compose(["recipe=quickstart", word]).problems
    assert said in str(problem)


@pytest.mark.parametrize(
    ("key", "fix"),
    [
        ("schedule.warmup", "write schedule.warmup=1%, its default"),
        ("trainer.tokens", "write trainer.tokens=null, its default"),
        ("model.experts.count", "write model.experts.count=0, its default"),
        ("model.dim", "give it another value"),
        ("batch.samples", "give it another value"),
        ("seed", "write seed=1, its default"),
        ("schedule", "choose another option: schedule=constant, cosine"),
    ],
)
def test_a_key_can_not_be_deleted(composer: Composer, key: str, fix: str) -> None:
    """A resumed run would take its default, in place of the value that it has, without a word."""
    composition = composer.compose(["recipe=quickstart", f"~{key}", "schedule=wsd"])
    (problem,) = composition.problems
    assert problem.key == key and fix in str(problem)
    assert composition.config.seed == 1 and composition.config.schedule.warmup == "5%"


def test_sweep_expands_into_jobs(composer: Composer) -> None:
    jobs = composer.expand(["optim.lr=1e-3,3e-3", "seed=2", "schedule=wsd,power"])
    assert [sorted(job) for job in jobs] == [
        sorted([f"optim.lr={lr}", "seed=2", f"schedule={schedule}"])
        for lr in ("0.001", "0.003")
        for schedule in ("wsd", "power")
    ]


def test_sweep_over_what_a_group_offers_and_over_no_list(composer: Composer) -> None:
    jobs = composer.expand(["schedule=glob(w*)", "seed=range(1,3)"])
    assert jobs == [["schedule=wsd", "seed=1"], ["schedule=wsd", "seed=2"]]
    with pytest.raises(ConfigError, match="seed: an interval has no list of values"):
        composer.expand(["seed=interval(0,1)"])


def test_a_composition_shares_nothing_with_the_next() -> None:
    """All tests compose with what `share_compositions` has kept: none may see what another has changed."""
    words = ["recipe=quickstart", "++parallel.deepspeed.config={a: [1]}"]
    first = make_composer().compose(words).config
    whole = OmegaConf.to_container(first)
    first.parallel.deepspeed.config.a.append(2)
    first.seed, first.optim.lr = 77, 0.5
    assert OmegaConf.to_container(make_composer().compose(words).config) == whole != OmegaConf.to_container(first)


def test_hydra_parses_reads_and_merges_a_line_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """It calls what `share_compositions` replaces of its private modules, which asserts that it is there."""
    calls = Counter[str]()

    def count(owner: Any, name: str) -> None:
        method = getattr(owner, name)

        @functools.wraps(method)
        def counted(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return method(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)

    for owner, name, _ in (PARSE, LOAD, CHOOSE, MERGE):
        count(owner, name)
    share_compositions()
    line = ["recipe=quickstart", "seed=4"]
    make_composer().compose(line)
    once = calls.copy()
    make_composer().compose(line)
    assert calls == once and once.keys() == {name for _, name, _ in (PARSE, LOAD, CHOOSE, MERGE)}
    monkeypatch.delattr(*MERGE[:2])
    with pytest.raises(
        AssertionError, match=r"ConfigLoaderImpl\._compose_config_from_defaults_list should take .*, and takes None"
    ):
        share_compositions()


def test_composing_leaves_hydra_as_it_was(composer: Composer) -> None:
    """A program that uses Hydra itself may ask for a config in the middle of its own run."""
    with initialize_config_module("meshloom.recipes", version_base="1.3"):
        theirs = GlobalHydra.instance().hydra
        assert config_of(make_composer(), "recipe=llama_1b").recipe == "llama_1b"
        assert GlobalHydra.instance().hydra is theirs
    assert not GlobalHydra.instance().is_initialized()


def test_sweep_folders_are_named_by_what_is_swept() -> None:
    line = ["recipe=quickstart", "data.input=a/b", "optim.lr=1e-3,3e-3", "optim.betas=[0.9,0.95],[0.8,0.9]"]
    job = ["data.input=a/b", "optim.lr=0.001", "optim.betas=[0.9,0.95]"]
    assert sweep_folder(line, job) == "optim.lr=0.001_optim.betas=[0.9,0.95]"
    assert sweep_folder(["seed=1"], ["seed=1"]) == "job"
    awkward = [f"trainer.sample_prompt={value}" for value in ("x/y", "x:y", "'x\\'y'", "e" * 300 + "1", "e" * 300 + "2")]
    names = [sweep_folder(["trainer.sample_prompt=a,b"], [override]) for override in awkward]
    assert len(set(names)) == 5 and all(len(name) < 230 and not set(name) & set("/:' ") for name in names)


def test_a_recipe_that_forgot_its_package_is_told_so(tmp_path: Path) -> None:
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "mine.yaml").write_text("recipe: mine\ntrainer:\n  steps: 3\n")
    (problem,) = make_composer(str(tmp_path)).compose(["recipe=mine"]).problems
    assert problem.fix == "put '# @package _global_' on the first line of recipe/mine.yaml"


def test_a_plus_sign_adds_no_key_that_nobody_reads(composer: Composer) -> None:
    line = ["+foo=1", "+trainer.step=5", "+parallel.deepspeed.stage=2", "+parallel.deepspeed.config.x.y=1", "seed=3"]
    composition = composer.compose(line)
    fixes = {problem.key: problem.fix for problem in composition.problems}
    assert fixes.keys() == {"foo", "trainer.step", "parallel.deepspeed.stage"}
    assert "trainer.steps" in fixes["trainer.step"]
    config = composition.config
    assert config.seed == 3 and config.parallel.deepspeed.config.x.y == 1, "what can be judged further is left"
    assert "foo" not in config and "step" not in config.trainer


def test_an_options_name_chooses_it(composer: Composer) -> None:
    """Scripts that set `optim.name` get that optimizer, and not AdamW under another name."""
    config = config_of(composer, "optim.name=lamb", "schedule.name=cosine", "batch.name=ramp", "optim.lr=0.5")
    assert config == config_of(composer, "optim=lamb", "schedule=cosine", "batch=ramp", "optim.lr=0.5")
    (problem,) = composer.compose(["optim.name=lam"]).problems
    assert problem.key == "optim" and "did you mean optim=lamb?" in problem.fix


def test_a_key_of_another_option_is_refused_where_typed(composer: Composer) -> None:
    (problem,) = composer.compose(["optim=lars", "optim.betas=[0.8,0.9]"]).problems
    assert problem.key == "optim.betas" and "optim=lars has no such key" in str(problem) and "optim=adamw" in problem.fix


def test_a_key_of_another_option_is_left_out_of_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "recipe").mkdir()
    recipe = "# @package _global_\ndefaults: [quickstart, _self_]\nrecipe: mine\noptim: {betas: [0.8, 0.9], lr: 0.5}\n"
    (tmp_path / "recipe" / "mine.yaml").write_text(recipe)
    composer = make_composer(str(tmp_path))
    assert composer.compose(["recipe=mine"]).config.optim.betas == [0.8, 0.9]
    composition = composer.compose(["recipe=mine", "optim=lars"])
    assert composition.problems == [] and composition.config.optim.lr == 0.5 and "betas" not in composition.config.optim
    (notice,) = [line for line in composition.notices if "left out" in line]
    assert notice.startswith("optim.betas of the recipe is left out: optim=lars has no such key")


def test_a_key_that_no_option_has_is_refused_in_a_recipe_too(tmp_path: Path) -> None:
    (tmp_path / "recipe").mkdir()
    recipe = "# @package _global_\ndefaults: [quickstart, _self_]\nrecipe: mine\noptim: {lrr: 0.5}\n"
    (tmp_path / "recipe" / "mine.yaml").write_text(recipe)
    (problem,) = make_composer(str(tmp_path)).compose(["recipe=mine"]).problems
    assert problem.key == "optim.lrr" and "did you mean optim.lr?" in problem.fix


def test_keys_of_another_class_may_be_deleted(composer: Composer) -> None:
    words = ["recipe=quickstart", "optim._target_=my.Optimizer", "~optim.betas", "~optim.fused"]
    assert not {"betas", "fused"} & config_of(composer, *words).optim.keys()  # a list, and null
    (problem,) = composer.compose([*words, "~optim.beta"]).problems
    assert problem.key == "optim.beta" and "there is no such key" in problem.message


def test_a_class_of_ones_own_may_have_any_keys(composer: Composer) -> None:
    composition = composer.compose(["optim._target_=mine.Optimizer", "optim.depth=3"])
    assert composition.problems == [] and composition.config.optim.depth == 3


def test_an_old_name_of_a_key_tells_the_new_one(composer: Composer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RENAMED_KEYS, "optim.rate", "optim.lr")
    monkeypatch.setitem(RENAMED_KEYS, "trainer.length", "trainer.steps")
    fixes = {problem.key: problem.fix for problem in composer.compose(["optim.rate=1", "trainer.length=3"]).problems}
    assert fixes == {"optim.rate": "write optim.lr", "trainer.length": "write trainer.steps"}
    saved = {"optim": {"rate": 0.5}, "trainer": {"length": 7}}
    assert with_renamed_keys(saved) == {"optim": {"lr": 0.5}, "trainer": {"steps": 7}}


@pytest.mark.parametrize(("option", "own"), [("lars", 1.0), ("adagrad_norm", 1.0), ("lamb", 0.002)])
def test_a_rate_written_for_another_optimizer_is_told(composer: Composer, option: str, own: float) -> None:
    (notice,) = composer.compose(["recipe=quickstart", f"optim={option}"]).notices
    assert notice == f"optim.lr=0.003 was written for optim=adamw; optim={option} has optim.lr={own} of its own"
    assert composer.compose(["recipe=quickstart", f"optim={option}", "optim.lr=0.003"]).notices == []


@pytest.mark.parametrize("words", [["optim=adamw"], ["optim=agvm"], ["schedule=cosine"], ["batch=ramp", "batch.max=64"]])
def test_values_that_mean_the_same_are_not_told(composer: Composer, words: list[str]) -> None:
    assert [line for line in composer.compose(["recipe=quickstart", *words]).notices if "was written for" in line] == []
