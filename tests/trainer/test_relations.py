"""Checks of how groups fit together: what each finds, that each names the keys it reads, and that none needs PyTorch."""

from __future__ import annotations

import subprocess
import sys

import pytest

from meshloom.config.problems import ConfigError, Problem
from meshloom.trainer.measured_steps import measuring_notices
from meshloom.trainer.relations import RELATIONS, Start, collect_problems
from meshloom.trainer.ring_exchange import ring_notices
from meshloom.trainer.schema import group_keys, groups
from support.configs import config_of, problems_of

MEASURED = ["batch=norm_test", "batch.samples=8", "batch.micro=2", "batch.max=64"]
FIT = [
    ("parallel", 4, ["parallel.tp=3"]),
    ("parallel.offload", 1, ["parallel.offload=nvme"]),
    ("parallel.gradient_exchange", 2, ["parallel.gradient_exchange=hierarchical", "parallel.zero=3"]),
    ("parallel.gradient_exchange", 2, ["parallel.gradient_exchange=direct", "parallel.zero=1", "parallel.pp=2"]),
    ("parallel.gradient_exchange", 2, ["parallel.gradient_exchange=direct", "parallel.zero=1", "parallel.engine=deepspeed"]),
    ("trainer.float8", 1, ["trainer.float8=tensorwise", "precision=fp32"]),
    ("checkpoint.folder", 1, ["checkpoint.folder='nowhere://x'"]),
    ("trainer.on_bad_step", 1, ["trainer.on_bad_step=rewind", "checkpoint.every=null"]),
    ("schedule.warmup", 1, ["schedule.warmup=500", "trainer.steps=100"]),
    ("batch.samples", 1, ["batch=norm_test", "batch.samples=2", "batch.micro=2"]),
    ("batch", 2, [*MEASURED, "parallel.pp=2", "model.tied=true"]),
    ("batch.micro", 1, ["optim=agvm", "batch.samples=2", "batch.micro=2"]),
    ("batch.stages", 1, ["batch=stages", "batch.stages='0:8 0:16'"]),
    ("data.input", 1, ["data=jsonl"]),
    ("optim.lr_coupling", 1, ["batch=ramp", "optim.lr_coupling=sqrt_saturating"]),
    ("schedule", 1, ["optim=schedule_free"]),
    ("optim.local.islands", 3, ["optim.local.islands=2"]),
    ("batch.samples", 4, ["optim.local.islands=4", "batch.samples=3", "batch.micro=1"]),
    ("batch.stages", 4, ["optim.local.islands=4", "batch=stages", "batch.stages='0:2 1000:8'", "batch.micro=1"]),
    ("batch", 2, ["optim.local.islands=2", *MEASURED]),
    ("parallel.pp", 4, ["optim.local.islands=2", "parallel.pp=2"]),
    ("trainer.on_bad_step", 2, ["optim.local.islands=2", "trainer.on_bad_step=rewind"]),
    ("trainer.masters", 1, ["trainer.masters=bf16_kahan"]),
    ("trainer.masters", 2, ["trainer.masters=bf16_stochastic", "precision=bf16", "parallel.zero=2"]),
    ("model.vocabulary", 1, ["data=synthetic", "data.vocabulary=99", "model.vocabulary=50"]),
]


@pytest.mark.parametrize(("key", "world_size", "words"), FIT, ids=lambda value: value if isinstance(value, str) else "")
def test_keys_that_do_not_fit_are_told_with_a_fix(key: str, world_size: int, words: list[str]) -> None:
    config = config_of("recipe=quickstart", *words)
    found = [problem for relation in RELATIONS for problem in relation.check(config, Start(world_size))]
    assert key in [problem.key for problem in found] and all(problem.fix for problem in found)
    assert key in problems_of(world_size, "recipe=quickstart", *words)


@pytest.mark.parametrize("words", [["parallel.zero=1"], ["parallel.zero=3", "optim=muon"], ["parallel.pp=2", "optim=soap"]])
def test_the_way_of_gradients_and_matrices_may_be_typed_where_it_is_read(words: list[str]) -> None:
    assert not problems_of(2, "recipe=quickstart", "parallel.gradient_exchange=hierarchical", *words)


def test_relations_name_keys_that_there_are() -> None:
    known = {one.name for group in groups() for one in group_keys(group)} | set(groups())
    assert {need for relation in RELATIONS for need in relation.needs} <= known


def test_a_relation_is_skipped_where_a_key_that_it_reads_is_wrong() -> None:
    found = problems_of(1, "recipe=quickstart", "schedule.warmup=500", "trainer.steps=-1")
    assert found.keys() == {"trainer.steps"}


def test_relations_need_no_torch() -> None:
    program = (
        "import sys\n"
        "from meshloom.trainer.automatic import resolve_automatic\n"
        "from meshloom.trainer.relations import RELATIONS, Start\n"
        "from meshloom.trainer.resolve import compose_config\n"
        "length = ['trainer.steps=null', 'trainer.tokens=1000000']\n"
        "words = ['recipe=quickstart', 'batch=norm_test', 'optim.lr=auto:step_law', *length]\n"
        "config, problems = resolve_automatic(compose_config(words)[0])\n"
        "assert not problems and isinstance(config.optim.lr, float)\n"
        "for relation in RELATIONS: list(relation.check(config, Start(2)))\n"
        "print('torch' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False"


def test_an_object_that_can_not_be_built_is_a_problem_of_its_group() -> None:
    def fails(error: Exception) -> list[Problem]:
        def check() -> list[Problem]:
            raise error

        return collect_problems("data", check)

    assert fails(ConfigError([Problem("data.x", "is wrong")])) == [Problem("data.x", "is wrong")]
    (absent,) = fails(FileNotFoundError(2, "No such file", "a.txt"))
    assert (absent.key, absent.message) == ("data", "a.txt: No such file")
    (unbuilt,) = fails(TypeError("no argument b"))
    assert "no argument b" in unbuilt.message and "data._target_" in unbuilt.fix


HYBRID = [*MEASURED, "parallel.hdp=greedy", "data.document_mask=true", "data.seq_len=1024"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["parallel.cp=2"], ["since batch.ema=0.9 smooths: they send a gradient more", "batch.interval=4 is measured"]),
        (["parallel.cp=2", "batch.ema=0"], ["one step in batch.interval=4: they send"]),
        ([*HYBRID, "batch.ema=0", "batch.interval=1"], ["every step: they are dealt worker by worker", "batch.interval=4"]),
    ],
)
def test_the_start_says_which_steps_measuring_slows(words: list[str], said: list[str]) -> None:
    notices = " ".join(measuring_notices(config_of(*MEASURED, *words)))
    assert all(part in notices for part in said)


@pytest.mark.parametrize("words", [MEASURED, ["parallel.cp=2"], ["parallel.cp=2", "batch=critical_loss"]])
def test_no_notice_where_no_rank_shares_what_is_measured(words: list[str]) -> None:
    assert measuring_notices(config_of(*words)) == []


LLAMA = ["recipe=llama_8b", "parallel.ring_exchange=queries", "precision=bf16"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (LLAMA, "there are no rings"),
        ([*LLAMA, "parallel.cp=2"], "sends 3.4 times the bytes"),  # 5 × 4096 × 2 + 12 × 32 of 6 × 1024 × 2
        ([*LLAMA, "data=stdlib", "parallel.hdp=greedy", "data.document_mask=true"], "sends 3.4 times the bytes"),
        ([*LLAMA, "parallel.cp=2", "model.kv_heads=32"], ""),
        (["recipe=llama_8b"], ""),
    ],
)
def test_the_start_says_where_queries_are_no_gain(words: list[str], said: str) -> None:
    found = ring_notices(config_of(*words))
    assert bool(found) == bool(said) and all(said in each for each in found)
