"""Values that no run can use, given on the command line: each is refused before a run starts, and its key is named."""

from __future__ import annotations

import pytest

from meshloom.config.compose import Composer
from meshloom.trainer.schema import make_composer
from meshloom.trainer.typed import typed_config
from meshloom.trainer.validate import run_problems

NOISE = ["batch=augmented", "batch.samples=16", "batch.micro=4", "batch.max=64"]
CRITICAL = ["batch=critical_loss", "batch.samples=16", "batch.micro=4", "batch.max=64"]


@pytest.fixture(scope="module")
def composer() -> Composer:
    return make_composer()


def found(composer: Composer, *overrides: str) -> dict[str, str]:
    composition = composer.compose(["recipe=quickstart", *overrides])
    assert composition.problems == []
    return {problem.key: str(problem) for problem in run_problems(typed_config(composition.config)[0], 1)}


@pytest.mark.parametrize(
    ("overrides", "key", "says"),
    [
        (["optim.eps=inf"], "optim.eps", "0 or more"),
        (["optim.eps=-1"], "optim.eps", "0 or more"),
        (["optim.weight_decay=inf"], "optim.weight_decay", "0 or more"),
        (["optim.betas=[1.0,0.95]"], "optim.betas", "[0, 1)"),
        (["optim.betas=[0.9,nan]"], "optim.betas", "[0, 1)"),
        (["optim.betas=[0.9]"], "optim.betas", "two numbers"),
        (["optim=lamb", "optim.betas=[0.9,0.99,0.999]"], "optim.betas", "two numbers"),
        (["optim=agvm", "optim.modules={head: '('}"], "optim.modules.head", "'(' is no pattern"),
        (["optim=agvm", "optim.anchor=x"], "optim.anchor", "embedding, head, attention"),
        (["schedule=power", "schedule.a=-1"], "schedule.a", "-1"),
        (["schedule=power", "schedule.a=nan"], "schedule.a", "nan"),
        (["schedule=power", "schedule.a=0"], "schedule.a", "above 0"),
        (["schedule=power", "schedule.b=nan"], "schedule.b", "nan"),
        (["schedule=power", "schedule.b=5"], "schedule.b", "0 or less"),
        (["schedule.warmup='1e400 steps'"], "schedule.warmup", "more than any run"),
        (["trainer.eval_every='1e400'"], "trainer.eval_every", "more than any run"),
        ([*NOISE, "batch.eta=nan"], "batch.eta", "positive number"),
        ([*NOISE, "batch.eta=inf"], "batch.eta", "positive number"),
        ([*NOISE, "batch.nu=nan"], "batch.nu", "positive number"),
        ([*NOISE, "batch.growth=nan"], "batch.growth", "more than 1"),
        ([*CRITICAL, "batch.alpha=nan"], "batch.alpha", "positive number"),
        ([*CRITICAL, "batch.tokens=inf"], "batch.tokens", "positive number"),
        (["batch=stages", "batch.micro=4", "batch.stages='0:8 0:16'"], "batch.stages", "don't rise"),
        (["data=text", "data.input=[1,a.txt]"], "data.input", "1 is no path"),
        (["data=text", "data.input=[null]"], "data.input", "None is no path"),
        (["data=text", "data.input=5"], "data.input", "5 is no path"),
        (["data=text", "data.input={a: 1}"], "data.input", "{'a': 1} is no path"),
        (["data=stdlib", "data.tokenizer=''"], "data.tokenizer", "'' not found"),
        (["data=stdlib", "data.tokenizer='~nobody-here/t.json'"], "data.tokenizer", "not found"),
        (["data=shards", "data.path='~nobody-here/shards'"], "data.path", "holds no token shards"),
    ],
)
def test_it_is_refused_by_its_key(composer: Composer, overrides: list[str], key: str, says: str) -> None:
    problems = found(composer, *overrides)
    assert says in problems[key], problems


@pytest.fixture(scope="module")
def mixing(tmp_path_factory: pytest.TempPathFactory) -> Composer:
    """With a recipe data=mix of two sources."""
    folder = tmp_path_factory.mktemp("recipes")
    (folder / "data").mkdir()
    defaults = "defaults: [base_mixture, /data@sources.code: stdlib, /data@sources.prose: text, _self_]"
    (folder / "data/mix.yaml").write_text(
        f"{defaults}\nsources: {{prose: {{input: {__file__}}}}}\nweights: {{code: 3, prose: 7}}\n"
    )
    return make_composer(str(folder))


@pytest.mark.parametrize(
    ("override", "key", "says"),
    [
        ("data.sources.code=null", "data.sources.code", "None is no source"),
        ("+data.sources.other=5", "data.sources.other", "5 is no source; name some in a recipe's defaults"),
        ("data.seq_len=0", "data.seq_len", "0 is not a length"),
        ("data.vocabulary=3", "data.vocabulary", "too small"),
        ("data.sources.code.packing=x", "data.sources.code.packing", "'x' is unknown"),
    ],
)
def test_a_mixture_names_the_key_that_is_to_be_changed(mixing: Composer, override: str, key: str, says: str) -> None:
    assert found(mixing, "data=mix") == {}
    problems = found(mixing, "data=mix", override)
    assert problems.keys() == {key} and says in problems[key]


def test_a_group_given_as_a_value_is_told_its_keys_in_one_line(composer: Composer) -> None:
    (problem,) = composer.compose(["recipe=quickstart", "logging=null"]).problems
    assert problem.key == "logging" and problem.fix.startswith("set one of its keys: logging.every, logging.progress, ")
    (problem,) = composer.compose(["recipe=quickstart", "optim.betas=null"]).problems
    assert problem.fix == "here it is optim.betas=[0.9, 0.95]"


def test_deepspeeds_keys_are_given_all_at_once_too(composer: Composer) -> None:
    composition = composer.compose(["recipe=quickstart", "parallel.deepspeed.config={aio: {block_size: 8}}"])
    assert composition.problems == [] and composition.config.parallel.deepspeed.config == {"aio": {"block_size": 8}}


def test_modules_of_agvm_are_given_on_the_command_line(composer: Composer) -> None:
    modules = r"optim.modules={blocks: '^layers\.', head: '^head'}"
    assert found(composer, "optim=agvm", "batch.micro=1", modules, "optim.anchor=blocks") == {}


def test_no_limit_is_a_limit_too(composer: Composer) -> None:
    assert found(composer, *NOISE, "batch.growth=inf") == found(composer, *NOISE, "batch.growth=null") == {}
