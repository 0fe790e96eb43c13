"""`batch.micro=auto` and `trainer.activation=auto`: what is decided, for which GPUs, and what stays."""

from __future__ import annotations

import itertools
import json
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from omegaconf import OmegaConf

from meshloom.launch.cli import main
from meshloom.launch.planning import resolve_plan
from meshloom.parallel.policies import MIXED
from meshloom.planner.cluster import ClusterConfig, load_cluster
from meshloom.trainer import launching, machine_gpus
from meshloom.trainer.costs import Costing
from meshloom.trainer.fitting import ALIKE, MICROS, Fitting
from meshloom.trainer.machine_gpus import machine_here, smallest_gpu
from meshloom.trainer.relations import Start
from meshloom.trainer.resolve import compose_config
from meshloom.trainer.resumed_config import resume_config
from meshloom.trainer.schema import RunConfig, make_composer
from meshloom.trainer.typed import plain_config, replace_keys, typed_config
from meshloom.trainer.validate import checked_config

AUTO = ["recipe=llama_1b", "batch.samples=64"]
TINY = ["recipe=quickstart", "batch.micro=auto", "trainer.activation=auto"]


def composed(*words: str) -> RunConfig:
    config, problems = compose_config(words)
    assert not problems
    return config


def h100(gpus: int, **changes: Any) -> Callable[[RunConfig], ClusterConfig]:
    cluster = replace(load_cluster([f"cluster=h100x{gpus}"]), **changes)
    return lambda _: cluster


def decided(words: Sequence[str], gpus: int, **changes: Any) -> tuple[int, str, str]:
    fitting = Fitting(h100(max(8, gpus), **changes))
    config, problems = fitting.resolve(composed(*words), Start(gpus), sound=True)
    assert problems == []
    return config.batch.micro_size, config.trainer.activation, " ".join(fitting.notices)


@pytest.mark.parametrize(("memory", "link"), [(30.0, 450.0), (79.1, 450.0), (178.0, 450.0), (178.0, 0.05)])
def test_no_other_choice_that_fits_is_faster(memory: float, link: float) -> None:
    """Every choice is planned by itself, and the best of them is what was decided, up to what predictions can't tell apart.

    Over a link that is slow enough they all are alike.
    """
    micro, policy, told = decided(AUTO, 8, memory=memory, link=link)
    config = replace_keys(composed(*AUTO), {"batch.micro": 1, "trainer.activation": "none"})
    costing = Costing(config, 8, h100(8, memory=memory, link=link)(config))
    found: dict[tuple[int, str], Any] = {}
    for size, kept in itertools.product(MICROS[:4], MIXED):
        found[size, kept] = costing.predict(replace_keys(config, {"batch.micro": size, "trainer.activation": kept}))
    fitting = {choice: each for choice, each in found.items() if each.fits}
    fastest = min(each.seconds for each in fitting.values())
    assert fitting[micro, policy].seconds <= fastest * (1 + ALIKE)
    alike = [each for each in fitting.values() if each.seconds <= fastest * (1 + ALIKE)]
    assert fitting[micro, policy].bytes == min(each.bytes for each in alike)
    assert (len({each.bytes for each in alike}) > 1) == (link < 1)
    assert f"batch.micro={micro}, trainer.activation={policy}, in place of auto" in told and f"{memory:.4g} GiB" in told


def test_more_memory_keeps_more() -> None:
    micro, policy, told = decided(["recipe=llama_8b", "batch.samples=16"], 2, memory=20.0)
    assert (micro, policy) == (1, "full") and "NOTHING FITS" in told and "--best" in told
    assert decided(["recipe=llama_8b", "batch.samples=16"], 2, memory=178.0)[1] == "none"


def test_typed_keys_stay() -> None:
    assert decided([*AUTO, "trainer.activation=full"], 8)[1] == "full"
    assert decided([*AUTO, "batch.micro=2"], 8)[0] == 2
    fitting = Fitting(h100(8))
    typed = composed(*AUTO, "batch.micro=2", "trainer.activation=none")
    assert fitting.resolve(typed, Start(8), sound=True) == (typed, []) and not fitting.notices and not fitting.values


def test_a_processor_computes_as_by_default() -> None:
    config, problems = checked_config(composed(*TINY), 1)
    assert problems == [] and (config.batch.micro, config.trainer.activation) == (8, "none")
    config, problems = checked_config(composed(*TINY, "batch.samples=4"), 2)
    assert problems == [] and config.batch.micro == 2, "a rank's share of the batch"


def test_a_choice_obeys_what_other_keys_ask_for() -> None:
    """Gradients are measured over micro-batches of which a batch must have several; compiled experts can't be kept in part."""
    measured = [*TINY, "batch=norm_test", "batch.samples=8", "batch.max=64"]
    config, problems = checked_config(composed(*measured), 1)
    assert problems == [] and config.batch.micro_size < 8
    micro, _, _ = decided(measured, 1)
    assert micro < 8
    dealt = ["recipe=moe_a1b", "parallel.ep=8", "trainer.compile=true", "batch.samples=64"]
    assert decided(dealt, 8, memory=24.0)[1] in ("none", "full")


def test_all_problems_are_told_of_a_run_that_has_others() -> None:
    _, problems = checked_config(composed(*TINY, "parallel.tp=3", "optim.lr=-1"), 4)
    assert {problem.key for problem in problems} >= {"optim.lr", "parallel"}
    _, problems = checked_config(composed(*TINY[:1], "batch.micro=some"), 1)
    assert [problem.key for problem in problems] == ["batch.micro"] and "auto" in str(problems[0])
    growing = ["recipe=quickstart", "batch=ramp", "batch.micro=auto", "batch.micro_max=8"]
    assert [problem.key for problem in checked_config(composed(*growing), 1)[1]] == ["batch.micro_max"]


def test_stages_may_not_find_micro_batches_that_are_recipe() -> None:
    stages = ["stages.one.tokens=100k", "stages.two.tokens=100k", "trainer.steps=null"]
    agvm = [*TINY, *(f"+{word}" for word in stages[:2]), stages[2], "optim=agvm"]
    _, problems = checked_config(composed(*agvm), 1)
    assert any(problem.key == "batch.micro" and "every stage" in problem.message for problem in problems)


def test_where_it_is_recipe_the_checkpoint_keeps_the_number() -> None:
    composer = make_composer()
    for choice, kept in ((["optim=agvm"], 2), ([], "auto")):
        saved = plain_config(typed_config(composer.compose([*TINY, *choice, "batch.micro=2"]).config)[0])
        today = composer.compose([*TINY[:1], *choice, "resume=auto"])
        OmegaConf.update(today.config, "batch.micro", "auto")
        config, _ = typed_config(resume_config(saved, today, ["resume=auto"]).config)
        assert config.batch.micro == kept


def test_a_typed_auto_is_decided_again_only_where_it_is_placement() -> None:
    """Words as a person repeats them to resume; the checkpoint has the number that the first start found."""
    composer = make_composer()
    for choice, kept in ((["optim=agvm"], 2), (["trainer.float8=tensorwise"], 2), ([], "auto")):
        words = ["recipe=quickstart", *choice, "batch.micro=auto"]
        saved = plain_config(typed_config(composer.compose([*words[:-1], "batch.micro=2"]).config)[0])
        resumed = resume_config(saved, composer.compose([*words, "resume=auto"]), [*words, "resume=auto"])
        assert typed_config(resumed.config)[0].batch.micro == kept
        assert any("batch.micro=2 stays" in told for told in resumed.notices) == (kept == 2)


def test_a_plans_first_line_says_which_gpus_are_assumed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def first_line(*words: str) -> str:
        assert main(["plan", *words]) == 0
        return capsys.readouterr().out.splitlines()[0]

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assumed = first_line(*AUTO, "launch.nproc=2")
    assert assumed.startswith("assumed NVIDIA H100 80GB") and assumed.endswith("cluster=…, for example cluster=h200x2")
    assert first_line("recipe=quickstart", "launch.nproc=1").startswith("no cluster is named or assumed: this is memory alone")
    assert "assumed" not in first_line(*AUTO, "cluster=a100x8")


def test_a_plan_shows_what_the_cluster_decides(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *AUTO, "cluster=a100x8", "cluster.memory=39.4"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "in place of auto: the fastest that fits NVIDIA A100 80GB of 39.4 GiB" in out
    assert main(["plan", *AUTO, "cluster=a100x8", "--best", "2", "--json"]) == 0
    for each in json.loads(capsys.readouterr().out)["best"]:
        for key in ("batch.micro", "trainer.activation"):
            assert f"{key}={each['settings'][key]}" in each["command"], "the line says what auto might decide otherwise"


def test_a_plan_without_a_cluster_is_made_for_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "H100" in " ".join(resolve_plan([*AUTO, "launch.nproc=8"]).notices)
    answering(monkeypatch, "0, GPU-a1, NVIDIA A100-SXM4-40GB, 40960\n")
    assert "A100-SXM4-40GB of 39.84 GiB" in " ".join(resolve_plan([*AUTO, "launch.nproc=8"]).notices)


def answering(monkeypatch: pytest.MonkeyPatch, text: str, gpus: int = 8) -> None:
    """Have nvidia-smi answer so."""
    smallest_gpu.cache_clear()
    monkeypatch.setattr(machine_gpus, "visible_gpus", lambda: gpus)

    def answer(*_: Any, **__: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess([], 0, stdout=text)

    monkeypatch.setattr(machine_gpus.subprocess, "run", answer)


def test_the_smallest_visible_gpu_is_what_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "0, GPU-a1, NVIDIA H200, 143771\n1, GPU-b2, NVIDIA H100 80GB HBM3, 81559\n2, GPU-c3, NVIDIA L40S, 46068\n"
    for visible, gpu, memory in (
        (None, "L40S", 44.8),
        ("0,1", "H100", 79.3),
        ("1,-1,2", "H100", 79.3),
        ("GPU-a1", "H200", 139.8),
    ):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        answering(monkeypatch, text)
        found = machine_here(composed(*TINY))
        assert found is not None and gpu in found.gpu and found.memory == pytest.approx(memory, abs=0.1)
    assert load_cluster(["cluster=h200"]).memory == pytest.approx(139.8)
    answering(monkeypatch, text, gpus=0)
    assert machine_here(composed(*TINY)) is None


@pytest.mark.parametrize(
    ("visible", "count"),
    [("-1", 0), ("NoDevFiles", 0), ("", 0), ("0, 3", 2), ("1,-1,2", 1), ("2,4,1", 1), ("GPU-a1,MIG-5c6d", 2), (None, 4)],
)
def test_gpus_count_up_to_the_first_invalid_entry(monkeypatch: pytest.MonkeyPatch, visible: str | None, count: int) -> None:
    """As CUDA reads its variable, on a host of four GPUs."""
    monkeypatch.setattr(launching, "Path", lambda _: SimpleNamespace(glob=lambda _: range(4)))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert launching.visible_gpus() == count


@pytest.mark.parametrize("text", ["No devices were found\n", "0, GPU-a1, NVIDIA GB10, [N/A], [N/A]\n"])
def test_gpus_that_do_not_answer_get_what_holds_least(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    answering(monkeypatch, text)
    fitting = Fitting(machine_here)
    config, problems = checked_config(composed(*TINY), 1, fitting=fitting)
    assert problems == [] and (config.batch.micro, config.trainer.activation) == (1, "full")
    assert "what holds least, for nvidia-smi does not tell" in fitting.notices[0]
    smallest_gpu.cache_clear()


@pytest.mark.parametrize("visible", [None, "MIG-5c6d"])
def test_parts_of_gpus_are_refused_by_key(monkeypatch: pytest.MonkeyPatch, visible: str | None) -> None:
    answering(monkeypatch, f"0, GPU-a1, NVIDIA H100 80GB HBM3, 81559, {'Disabled' if visible else 'Enabled'}\n")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible or "0")
    _, problems = checked_config(composed(*TINY), 1, fitting=Fitting(machine_here))
    assert [problem.key for problem in problems] == ["batch.micro", "trainer.activation"] and "MIG" in str(problems[0])
    smallest_gpu.cache_clear()


def test_a_layout_that_can_not_be_is_refused_not_planned() -> None:
    """A pipeline longer than the model, alone and beside a fault that has nothing to do with the choice."""
    for more in ([], ["trainer.on_bad_step=rewind", "checkpoint.every=0"]):
        config = composed(*AUTO, "parallel.pp=32", *more)
        _, problems = checked_config(config, 64, fitting=Fitting(h100(64)))
        assert any(problem.key.startswith("parallel") for problem in problems), problems
        assert bool(more) == any(problem.key == "trainer.on_bad_step" for problem in problems)


def test_a_batch_that_grows_is_fitted_at_its_largest() -> None:
    small = [word for word in AUTO if not word.startswith("batch.")]
    growing = [["batch=ramp", "batch.samples=8", "batch.max=64"], ["batch=stages", "batch.stages='0:8 1B:64'"]]
    for words in growing:
        assert decided([*small, *words, "batch.micro=auto"], 8)[0] == decided(AUTO, 8)[0] > 1


def test_a_micro_batch_alone_in_its_step_is_tried_where_smaller_ones_do_not_fit() -> None:
    """It holds no added-up gradients: between what it needs and what smaller ones need, it alone fits."""
    words = ["recipe=llama_1b", "batch.samples=16", "trainer.activation=full"]
    config = replace_keys(composed(*words), {"batch.micro": 1})
    costing = Costing(config, 8, h100(8)(config))
    bytes_of = {micro: costing.predict(replace_keys(config, {"batch.micro": micro})).bytes for micro in (1, 2)}
    assert bytes_of[2] < bytes_of[1]
    memory = ((bytes_of[1] + bytes_of[2]) / 2 / 2**30 + 2) / 0.97
    assert decided(words, 8, memory=memory)[0] == 2
