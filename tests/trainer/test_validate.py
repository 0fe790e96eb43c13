"""All of a run's problems are found before anything starts, whichever floor knows of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from meshloom.config.compose import Composer
from meshloom.config.problems import Problem
from meshloom.optim.history import BatchHistory, ChangePoint
from meshloom.optim.progress import Progress
from meshloom.trainer.relations import collect_problems
from meshloom.trainer.schema import make_composer
from meshloom.trainer.typed import typed_config
from meshloom.trainer.validate import run_problems
from support.configs import config_of


@pytest.fixture(scope="module")
def composer() -> Composer:
    return make_composer()


def problems_of(composer: Composer, world_size: int, *overrides: str) -> dict[str, str]:
    composition = composer.compose(["recipe=quickstart", *overrides])
    assert composition.problems == []
    return {problem.key: str(problem) for problem in run_problems(typed_config(composition.config)[0], world_size)}


@pytest.mark.parametrize(
    ("recipe", "world_size"),
    [
        ("quickstart", 1),
        ("quickstart", 4),
        ("llama_1b", 1),
        ("llama_3b", 8),
        ("llama_8b", 2),
        ("llama_70b", 64),
        ("deepseek_v3", 2048),
    ],
)
def test_recipes_run_on_the_machines_they_are_for(composer: Composer, recipe: str, world_size: int) -> None:
    assert problems_of(composer, world_size, f"recipe={recipe}") == {}


@pytest.mark.parametrize("recipe", ["quickstart", "llama_1b", "llama_70b"])
def test_synthetic_data_fits_any_recipe(composer: Composer, recipe: str) -> None:
    assert problems_of(composer, 8, f"recipe={recipe}", "data=synthetic") == {}


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear", "wsd", "power"])
def test_every_schedule_fits_quickstart(composer: Composer, schedule: str) -> None:
    assert problems_of(composer, 1, f"schedule={schedule}") == {}


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize(
    "batch",
    [
        ["batch.samples=10", "batch.micro=4"],
        ["batch.samples=1"],
        ["batch=ramp", "batch.samples=5", "batch.max=19"],
        ["batch=norm_test", "batch.samples=9", "batch.micro=4", "batch.max=50"],
        ["optim=agvm", "batch.samples=7", "batch.micro=4"],
    ],
)
def test_any_batch_runs_on_any_number_of_processes(composer: Composer, world_size: int, batch: list[str]) -> None:
    assert problems_of(composer, world_size, *batch) == {}


@pytest.mark.parametrize("batch", [[], ["batch=ramp"], ["batch=norm_test"]])
def test_a_batch_of_no_samples_is_refused(composer: Composer, batch: list[str]) -> None:
    found = problems_of(composer, 1, *batch, "batch.samples=0", "batch.micro=-1", "parallel.zero=9")
    assert found.keys() == {"batch.samples", "batch.micro", "parallel.zero"}
    assert "0 is not a number of samples" in found["batch.samples"]


def test_five_wrong_things_are_named_at_once(composer: Composer) -> None:
    """Of five groups, none of which hides another's."""
    wrong = ["batch.samples=0", "optim.lr=-1", "parallel.zero=9", "schedule.warmup=abc", "data.seq_len=-4"]
    found = problems_of(composer, 1, *wrong)
    assert found.keys() == {word.partition("=")[0] for word in wrong}
    assert all("; " in said for said in found.values()), "each has a fix"


def test_a_length_that_can_not_be_read_is_one_problem(composer: Composer) -> None:
    composition = composer.compose(["recipe=quickstart", "trainer.steps=null", "trainer.tokens=many"])
    found = run_problems(typed_config(composition.config)[0], 1, composition.problems)
    assert [problem.key for problem in found] == ["trainer.tokens"]


def test_a_misspelt_key_hides_nothing_of_its_group(composer: Composer) -> None:
    composition = composer.compose(["recipe=quickstart", "parallel.zeroo=1", "parallel.tp=3"])
    found = run_problems(typed_config(composition.config)[0], 2, composition.problems)
    assert [problem.key for problem in found] == ["parallel.zeroo", "parallel", "parallel"]
    assert "nearest: parallel.tp=2" in found[-1].fix


def test_layout_is_judged_beside_other_groups(composer: Composer) -> None:
    """Also where the optimizer is wrong, so that nothing is built."""
    found = problems_of(composer, 4, "model.kv_heads=2", "model.heads=4", "parallel.tp=4", "model.ffn_dim=330", "optim.lr=-1")
    assert found.keys() == {"optim.lr", "parallel.tp", "parallel"}
    assert "model.ffn_dim=330" in found["parallel.tp"] and "nearest: " in found["parallel"]


def test_a_users_decoder_is_judged_by_its_shape(tmp_path: Path) -> None:
    """Its keys name no sizes; the built model knows them."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("_target_: support.user_gpt.small_decoder\n")
    found = problems_of(make_composer(str(tmp_path)), 4, "model=mine", "parallel.tp=4")
    assert "3 attention heads" in found["parallel.tp"]


def test_every_floor_is_asked_at_once(composer: Composer) -> None:
    found = problems_of(
        composer,
        4,
        "precision=half",
        "parallel.zero=7",
        "checkpoint.keep=-1",
        "data.packing=loose",
        "schedule.warmup=500",
        "model.kv_heads=3",
        "trainer.activation=some",
        "launch.nproc=0",
    )
    assert {
        "precision",
        "parallel.zero",
        "checkpoint.keep",
        "data.packing",
        "model.kv_heads",
        "trainer.activation",
        "launch.nproc",
    } <= set(found)


@pytest.mark.parametrize("group", ["model", "data", "schedule", "batch", "optim"])
def test_a_class_that_is_not_there_is_a_problem_of_its_group(composer: Composer, group: str) -> None:
    found = problems_of(composer, 1, f"{group}._target_=nowhere.Nothing")
    assert any(key.startswith(group) and "nowhere" in said for key, said in found.items()), found


def test_nothing_is_instantiated_that_is_missing(composer: Composer) -> None:
    config, untyped = typed_config(composer.compose(["recipe=quickstart", "data.seq_len='???'"]).config)
    assert [str(problem) for problem in run_problems(config, 1, untyped)] == [
        "data.seq_len: is not set; give it as data.seq_len=…"
    ]


@pytest.mark.parametrize(
    ("override", "group", "reason"),
    [("optim.betas=[2,0.9]", "optim", "beta"), ("+model.depth=3", "model", "depth"), ("+data.size=3", "data", "size")],
)
def test_keys_that_a_class_refuses_are_a_problem_of_its_group(
    composer: Composer, override: str, group: str, reason: str
) -> None:
    composition = composer.compose(["recipe=quickstart", override])
    if composition.problems:  # the schema knows already
        found = [str(problem) for problem in composition.problems]
    else:
        found = [str(problem) for problem in run_problems(typed_config(composition.config)[0], 1)]
    assert len(found) == 1 and found[0].startswith(group) and reason in found[0]


@pytest.mark.parametrize(
    ("hook", "says"),
    [
        ("banana", "names no class"),
        ("{_target_: nowhere.Hook}", "nowhere.Hook can't be imported: No module named 'nowhere'"),
        ("{_target_: builtins.dict}", "is no hook"),
        ("{_target_: meshloom.trainer.hooks.garbage.CollectGarbage, evry: 3}", "evry"),
    ],
)
def test_a_value_that_is_no_hook_is_refused(composer: Composer, hook: str, says: str) -> None:
    good = "{_target_: meshloom.trainer.hooks.garbage.CollectGarbage, every: 3}"
    found = problems_of(composer, 1, f"trainer.hooks=[{good}, {hook}]")
    assert list(found) == ["trainer.hooks[1]"] and says in found["trainer.hooks[1]"]


def test_a_batch_that_can_never_be_measured_is_refused(composer: Composer) -> None:
    """One micro-batch has no spread: the norm test would never say a word, and the batch never grow."""
    alone = ("batch=norm_test", "batch.samples=4", "batch.micro=4")
    assert "nothing to compare" in problems_of(composer, 1, *alone)["batch.samples"]
    assert problems_of(composer, 1, *alone[:2], "batch.micro=2") == {}
    assert problems_of(composer, 1, "batch=norm_test", "batch.samples=4", "batch.micro=4", "batch.multiple=8").keys() == {
        "batch.samples"
    }
    assert problems_of(composer, 1, "batch=critical_loss", "batch.samples=4", "batch.micro=4") == {}, "measures nothing"


@pytest.mark.parametrize(
    ("overrides", "keeps_off"),
    [
        (["batch=norm_test", "parallel.pp=2", "model.tied=true"], "tied embedding"),
        (["batch=inner_product", "parallel.tp=2"], "tensor parallelism"),
        (["batch=augmented", "parallel.engine=deepspeed", "parallel.zero=1"], "whole gradient"),
    ],
)
def test_layouts_that_measure_wrongly_are_refused(composer: Composer, overrides: list[str], keeps_off: str) -> None:
    small = ["batch.samples=8", "batch.micro=1", "batch.max=64", "data=synthetic", "model.vocabulary=96", "precision=fp32"]
    assert keeps_off in problems_of(composer, 2, *small, *overrides)["batch"]
    assert "batch" not in problems_of(composer, 2, *small, *overrides, "batch=critical_loss"), "it measures no gradient"


def test_agvm_is_refused_where_it_would_see_no_halves(composer: Composer) -> None:
    agvm = ["optim=agvm", "batch.samples=8", "batch.micro=1", "precision=fp32"]
    assert problems_of(composer, 1, *agvm) == {}
    assert "halves" in problems_of(composer, 1, *agvm, "parallel.engine=deepspeed", "parallel.zero=1")["optim"]
    stages = [*agvm, "batch=stages"]
    assert problems_of(composer, 1, *stages, "batch.stages='0:8 3steps:2'") == {}
    assert "two micro-batches" in problems_of(composer, 1, *stages, "batch.stages='0:8 3steps:1'")["batch.micro"]
    assert "two micro-batches" in problems_of(composer, 1, *stages, "batch.stages='0:1 3steps:8'")["batch.micro"]


@pytest.mark.parametrize(
    ("optim", "setting"),
    [
        ("lars", "trust=-1"),
        ("lars", "momentum=1"),
        ("lars", "weight_decay=nan"),
        ("lamb", "eps=0"),
        ("lamb", "norm_max=-2"),
        ("lamb", "betas=[0.9,1]"),
        ("lamb", "weight_decay=-1"),
        ("agvm", "interval=0"),
        ("agvm", "begin=-4"),
        ("agvm", "smoothing=1"),
        ("adagrad", "initial=-1"),
        ("adagrad_norm", "initial=0"),
        ("adagrad_norm", "initial=nan"),
    ],
)
def test_numbers_that_no_optimizer_can_use_are_refused(composer: Composer, optim: str, setting: str) -> None:
    base = [f"optim={optim}", "batch.samples=8", "batch.micro=1"]
    key, value = setting.split("=")
    found = problems_of(composer, 1, *base, f"optim.{setting}")
    assert list(found) == [f"optim.{key}"]
    assert value.strip("[]").split(",")[-1] in found[f"optim.{key}"] and "; use " in found[f"optim.{key}"]


@pytest.mark.parametrize("engine", ["torch", "deepspeed"])
def test_unread_names_and_keys_are_refused_by_every_engine(composer: Composer, engine: str) -> None:
    work = [f"parallel.engine={engine}", "parallel.zero=1", "batch.samples=8", "batch.micro=1", "precision=fp32"]
    faults = ["parallel.schedule=bogus", "parallel.cp_kind=nope", "parallel.offload_path=/nowhere"]
    found = problems_of(composer, 1, *work, *faults)
    found.pop("parallel", None)  # what the torch engine could do instead
    found.pop("parallel.engine", None)  # where DeepSpeed is not installed
    assert found.keys() == {"parallel.schedule", "parallel.cp_kind", "parallel.offload_path"}
    assert all(fix in text for fix, text in zip(("1f1b", "ring", "null"), found.values(), strict=True))
    for key in ("stages_per_rank=7", "stage_layers=[4]"):
        assert "parallel.pp" in problems_of(composer, 1, *work, f"parallel.{key}")[f"parallel.{key.split('=')[0]}"]


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["model.ffn_dim=360"], "ffn.w1 is 360 × 128"),
        (["data.seq_len=100", "batch.micro=2"], "batch.micro × data.seq_len / parallel.cp = 200 tokens"),
    ],
)
def test_sizes_that_float8_can_not_take_are_refused(
    composer: Composer, monkeypatch: pytest.MonkeyPatch, overrides: list[str], says: str
) -> None:
    """Of a weight, and of a micro-batch, along whose tokens the product for a weight's gradient sums."""
    monkeypatch.setattr("meshloom.parallel.limits.importlib.util.find_spec", str)
    base = ["data=synthetic", "precision=bf16", "trainer.float8=tensorwise", "batch.samples=8", "model.ffn_dim=352"]
    found = problems_of(composer, 1, *base, *overrides)
    found_without = problems_of(composer, 1, *base, "data.seq_len=128", "batch.micro=1")
    assert says in found["trainer.float8"] and says not in found_without.get("trainer.float8", "")


def test_a_url_that_nothing_can_read_is_refused(composer: Composer) -> None:
    assert "nosuch" in problems_of(composer, 1, "checkpoint.folder='nosuch://bucket/run'")["checkpoint.folder"]


def test_checkpoints_in_the_memory_of_one_process_are_refused(composer: Composer) -> None:
    found = problems_of(composer, 1, "checkpoint.folder=memory://run")
    assert "another one writes checkpoints" in found.pop("checkpoint.folder") and not found


def test_an_error_that_names_no_file_keeps_its_words() -> None:
    def fail() -> list[Problem]:
        raise OSError("the data set's server does not answer")

    assert [str(problem) for problem in collect_problems("data", fail)] == [
        "data: the data set's server does not answer; check the keys of data"
    ]


def test_a_schedule_is_checked_with_the_batches_that_were() -> None:
    """20 steps of 8 samples, then 32: 40 steps of the warm-up are 800 samples, and 1,280 at today's batch."""
    config = config_of("recipe=quickstart", "trainer.steps=null", "trainer.tokens=256000", "schedule.warmup=40")
    point = Progress(20, 160, 160 * 256, 8, BatchHistory((ChangePoint(0, 0, 0, 8),)))
    assert [problem.key for problem in run_problems(config, 1)] == ["schedule.warmup"]
    assert run_problems(config, 1, progress=point) == []
