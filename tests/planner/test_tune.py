"""`meshloom tune`: what it proposes fits by the planner's own account, keeps what was given, and can be run."""

from __future__ import annotations

import multiprocessing
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from rich.console import Console

from meshloom.config.problems import ConfigError
from meshloom.launch import tune_measure
from meshloom.launch.cli import main
from meshloom.launch.planning import Plan, make_plan
from meshloom.launch.tune_measure import Trial, common_overrides, measure, reason, trial_samples
from meshloom.launch.tune_search import BUDGET, Tuned, divisors, tune
from meshloom.planner import gpus as gpus_module
from meshloom.planner.gpus import GpusHere
from meshloom.planner.prediction import RESERVE, SHARE
from meshloom.planner.tables import GIB
from meshloom.planner.traffic import Traffic, torch_moved
from support.forked_commands import ForkedCommand
from support.plans import LLAMA, SMALL, tokens_per_second

TINY = [
    "recipe=quickstart",
    "data.seq_len=16",
    "model.dim=16",
    "model.layers=2",
    "model.ffn_dim=32",
    "model.vocabulary=64",
    "batch.samples=8",
]


def held(plan: Plan) -> int:
    return max(rank.total for rank in plan.cost.ranks)


@pytest.fixture(scope="module")
def two() -> Tuned:
    return tune([*LLAMA, "launch.nproc=2"], 139 * GIB)


def test_a_tuned_layout_fits_by_the_plan_of_its_command_line(two: Tuned) -> None:
    assert two.limit == pytest.approx((139 - RESERVE - SHARE * 139) * GIB)
    assert all(held(one.plan) <= two.limit for one in two.fitting)
    for one in two.fitting[::9]:
        again = make_plan([*LLAMA, "launch.nproc=2", *two.changes(one)])
        assert held(again) == one.bytes and again.parallel == one.plan.parallel and again.job == one.plan.job


def test_nothing_is_computed_again_where_everything_fits(two: Tuned) -> None:
    best = two.fitting[0].settings
    assert best["trainer.activation"] == "none" and best["trainer.activation_budget"] is None
    assert best["parallel.zero"] == 1, "whole weights cost less per pass than gathering them"
    assert best["batch.micro"] == 4, "one micro-batch adds nothing up"
    assert {one.settings["batch.micro"] for one in two.fitting} == {1, 2, 4}
    assert {one.settings["parallel.zero"] for one in two.fitting} == {1, 2, 3}


def test_islands_share_the_memory_of_their_machine() -> None:
    """Eight islands of one process, on four machines of two: a process has half of a machine's memory."""
    words = [*SMALL, "batch.samples=64", "optim.local.islands=8", "trainer.activation=none", "batch.micro=4"]
    tuned = tune([*words, "launch.nodes=4", "launch.nproc=2"], 139 * GIB, host=100 * GIB)
    assert tuned.host == 50 * GIB
    (one,) = tuned.fitting
    assert one.plan.job.micro_batches == 2 and one.plan.processes == 8
    alone = tune([*words[:2], "batch.samples=8", *words[4:], "launch.nproc=1"], 139 * GIB).fitting[0]
    assert one.speed == pytest.approx(alone.speed, rel=1e-2), "of a process"
    assert trial_samples(tuned.config, [one]) is None, "a process has two micro-batches, and four would tell enough"


def test_where_memory_is_short_blocks_keep_what_they_can() -> None:
    words = ["recipe=llama_1b", "batch.samples=4", "launch.nproc=1", "batch.micro=4"]
    tuned = tune(words, 55 * GIB)
    whole = make_plan([*words, "trainer.activation=none"])
    best = tuned.fitting[0]
    assert held(whole) > tuned.limit >= best.bytes
    budget = best.settings["trainer.activation_budget"]
    assert budget is not None and 0 < budget < 1
    more = make_plan([*words, "trainer.activation=none", f"trainer.activation_budget={budget + 0.1}"])
    assert held(more) > tuned.limit, "the budget is about the largest that fits"
    assert {one.settings["parallel.zero"] for one in tuned.fitting} == {1}, "on one rank all stages are the same"


@pytest.mark.parametrize(
    "given",
    [
        {"parallel.zero": 3},
        {"batch.micro": 2},
        {"trainer.activation": "selective"},
        {"trainer.activation": "none", "trainer.activation_budget": 0.5},
    ],
    ids=lambda given: " ".join(given),
)
def test_given_keys_stay(given: dict[str, object]) -> None:
    words = [f"{key}={value}" for key, value in given.items()]
    tuned = tune([*SMALL, "batch.samples=8", "launch.nproc=2", *words], 139 * GIB)
    assert len(tuned.fitting) > 1
    for one in tuned.fitting:
        assert {key: one.settings[key] for key in given} == given
        assert not {change.partition("=")[0] for change in tuned.changes(one)} & set(given)
    assert any("as the command line says" in note for note in tuned.notes)


def test_micro_batches_divide_a_ranks_share(tmp_path: Path) -> None:
    (tmp_path / "recipe").mkdir()
    own = "# @package _global_\ndefaults:\n  - /recipe/llama_1b\n  - _self_\nrecipe: mine\nbatch:\n  micro: 4\n"
    (tmp_path / "recipe" / "mine.yaml").write_text(own)
    words = ["recipe=mine", *SMALL[1:], "batch.samples=12", "launch.nproc=2", "trainer.activation=none"]
    tuned = tune(words, 139 * GIB, str(tmp_path))
    others = [one for one in tuned.fitting if one is not tuned.as_given]
    assert {one.settings["batch.micro"] for one in others} == {1, 2, 3, 6}
    assert all(one.plan.job.micro * one.plan.job.micro_batches == 6 for one in others)
    assert tuned.as_given is not None, "the recipe's micro-batches of 4 don't divide it, but blank rows fill them"
    assert tuned.as_given.plan.job.micro_batches == 2


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["batch=norm_test", "batch.max=64"], "measures gradients"),
        (["optim=agvm"], "optim=agvm"),
    ],
)
def test_micro_batch_stays_where_it_is_part_of_the_recipe(words: list[str], why: str) -> None:
    micro = "batch.micro=2" if "agvm" in words[0] else "batch.micro=4"
    config = [*SMALL, "batch.samples=16", "launch.nproc=1", "trainer.activation=none", *words]
    assert tune([*config, micro], 139 * GIB).fitting
    kept = tune(config, 139 * GIB)
    assert len({one.settings["batch.micro"] for one in kept.fitting}) == 1
    assert any(why in note and "stays" in note for note in kept.notes)


def test_predictions_are_near_what_was_measured_and_in_its_order() -> None:
    """H200, tokens/s per GPU. One micro-batch of 4 as of 2026-11-22.

    4 of 1 take passes of 131.3 ms (2026-12-01, today's kernels), with 26.8 ms of sums and update as planned.
    """
    alone = tokens_per_second("batch.samples=4", "launch.nproc=1")
    assert alone == pytest.approx(62_500, rel=0.03)
    small = tokens_per_second("batch.samples=4", "batch.micro=1", "launch.nproc=1")
    assert small == pytest.approx(4 * 8192 / (4 * 0.1313 + 0.0268), rel=0.03) and small < alone
    zero = {stage: tokens_per_second("batch.samples=8", "launch.nproc=2", f"parallel.zero={stage}") for stage in (1, 2, 3)}
    assert alone > zero[1] > zero[2] > zero[3]
    assert zero[3] / zero[1] == pytest.approx(58_450 / 60_000, abs=0.01)
    again = {
        policy: tokens_per_second("batch.samples=4", "launch.nproc=1", f"trainer.activation={policy}")
        for policy in ("none", "selective", "full", "offload")
    }
    assert again["none"] > again["selective"] > again["full"] > again["offload"]


def test_bytes_that_travel() -> None:
    """By hand, for two ranks: every rank sends half of its gradients and its half of the weights."""
    parameters = 1_498_482_688
    one = make_plan([*LLAMA, "launch.nproc=2", "parallel.zero=1"])
    (rank,) = one.cost.ranks
    traffic = torch_moved(rank, one.parallel, one.layout, one.job)
    assert traffic.between == pytest.approx(2 * parameters / 2 + 2 * parameters / 2, rel=1e-3)
    assert traffic.within == pytest.approx((3 * 2 + 4 / 2) * parameters, rel=1e-3)
    assert traffic.update == pytest.approx(34 / 2 * parameters, rel=1e-3)
    three = make_plan([*LLAMA, "launch.nproc=2", "parallel.zero=3", "batch.micro=1"])  # 4 micro-batches
    traffic = torch_moved(three.cost.ranks[0], three.parallel, three.layout, three.job)
    assert traffic.between == pytest.approx(4 * (2 * 2 + 4) * parameters / 2, rel=1e-3)
    alone = make_plan(["recipe=llama_1b", "batch.samples=4", "launch.nproc=1"])
    assert torch_moved(alone.cost.ranks[0], alone.parallel, alone.layout, alone.job) == Traffic(0, 0, 30 * parameters)


def test_blanks_fill_up_to_what_a_pipeline_can_run() -> None:
    """`interleaved` on 4 ranks can't run 9 or 18 micro-batches, which micro-batches of 4 and of 2 make; it runs 10 and 20."""
    pipeline = ["launch.nproc=4", "parallel.pp=4", "parallel.schedule=interleaved", "batch.samples=36"]
    tuned = tune(["recipe=llama_1b", *pipeline, "trainer.activation=full"], 80 * GIB)
    passes = {one.settings["batch.micro"]: one.plan.job.micro_batches for one in tuned.fitting}
    assert {micro: passes[micro] for micro in (1, 2, 3, 4)} == {1: 36, 2: 20, 3: 12, 4: 10}


def test_prints_a_table_and_a_line_to_paste(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["recipe=llama_8b", "launch.nproc=2", "batch.samples=4", "trainer.activation=selective", "output_dir=my run"]
    assert main(["tune", *words, "--memory=139"]) == 0
    out = capsys.readouterr().out
    assert "a plan may take 132.8 of 139.0 GiB" in out and "as given" in out
    line = shlex.split(out.splitlines()[-1])
    assert line[:2] == ["meshloom", "train"] and line[2 : 2 + len(words)] == words
    assert held(make_plan(line[2:])) <= 132.9 * GIB


def test_every_refusal_has_a_way_out(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*words: str) -> str:
        assert main(["tune", *words]) == 2
        printed = capsys.readouterr()
        assert not printed.out.strip()
        return printed.err

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert "--memory: there is no GPU here to ask; give what one GPU has, in GiB: --memory 80" in refused(*LLAMA)
    assert "-3 is not a number of GiB" in refused(*LLAMA, "--memory=-3")
    assert "--measure: -1 is not a number of runs" in refused(*LLAMA, "--memory=80", "--measure=-1")
    text = refused(*SMALL, "batch.samples=8", "launch.nproc=1", "--memory=6")
    assert "nothing fits: the least, parallel.zero=1 batch.micro=" in text and "trainer.activation=full" in text
    assert "use more processes" in text
    text = refused(*LLAMA, "launch.nproc=2", "parallel.tp=3", "parallel.zeroo=1", "--memory=80")
    assert "did you mean parallel.zero?" in text and "does not divide 2 processes" in text
    assert "batch.samples" in refused(*SMALL, "batch.samples=???", "--memory=80")
    assert "one candidate would take a CPU about" in refused(*LLAMA, "--memory=80", "--measure=1", "launch.nproc=1")
    text = refused(*SMALL, "launch.nproc=8", "launch.nodes=2", "--memory=80", "--measure=1", "batch.samples=16")
    assert "not on launch.nodes=2" in text


def test_trials_leave_out_all_but_training(two: Tuned, tmp_path: Path) -> None:
    words = [*LLAMA, "data=text", "data.input=nowhere", "logging.wandb=true", "output_dir=mine", "resume=auto", "optim.lr=1e-3"]
    common, notes = common_overrides(two, two.fitting[:2], words, None)
    assert not notes
    assert "optim.lr=1e-3" in common and "data=synthetic" in common and "data.seq_len=8192" in common
    assert {"checkpoint.every=0", "logging.wandb=false", "trainer.eval_every=0", "resume=none"} <= set(common)
    assert not {"data=text", "data.input=nowhere", "logging.wandb=true", "output_dir=mine", "resume=auto"} & set(common)

    recipe = tmp_path / "recipe" / "mine.yaml"
    recipe.parent.mkdir()
    recipe.write_text(
        "# @package _global_\ndefaults:\n  - /recipe/llama_1b\n  - override /data: shards\n  - _self_\n"
        "recipe: mine\ndata:\n  path: /nowhere\n"
    )
    common, notes = common_overrides(two, two.fitting[:2], ["recipe=mine"], str(tmp_path))
    assert "data=synthetic" not in common and "the run's own data" in notes[0]


def test_long_steps_are_cut_short() -> None:
    words = [*SMALL, "batch.samples=528", "launch.nproc=2", "trainer.activation=full"]
    tuned = tune(words, 20 * GIB)
    four, six = (next(one for one in tuned.fitting if one.settings["batch.micro"] == size) for size in (4, 6))
    assert trial_samples(tuned.config, [four, six]) == 2 * 12 * 4, "whole micro-batches for both"
    common, notes = common_overrides(tuned, [four, six], words, None)
    assert "batch.samples=96" in common and "batch.samples=528" not in common and "batch.samples=96" in notes[0]
    pipeline = tune([*words, "parallel.pp=2"], 20 * GIB)
    assert trial_samples(pipeline.config, pipeline.fitting[:1]) is None, "its bubble depends on how many there are"


def test_nothing_measured_is_a_failure(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune_measure, "gpu_count", lambda: 1)
    monkeypatch.setattr(tune_measure, "_trial", lambda candidate, *_rest: Trial(candidate, failure="out of memory (x)"))
    words = [*SMALL, "launch.nproc=1", "batch.samples=4", "trainer.activation=none", "--memory=80", "--measure=9"]
    assert main(["tune", *words]) == 1
    printed = capsys.readouterr()
    assert printed.out.count(": out of memory (x)") == 3, "as many as there are"
    assert "none of them could be measured" in printed.err and "meshloom train" not in printed.out


def test_failures_are_told_by_their_cause() -> None:
    text = """[rank1]: Traceback (most recent call last):
[rank1]:   File "x.py", line 3, in f
[rank1]: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.50 GiB. GPU 1 has a total capacity of 139.80 GiB
torch.distributed.elastic.multiprocessing.errors.ChildFailedError: x
==========
"""
    assert reason(text, 1) == "out of memory (tried to allocate 2.50 GiB)"
    text = text.replace("torch.OutOfMemoryError: CUDA", "RuntimeError: no").replace("x\n=", "y\n=")
    assert reason(text, 1).startswith("failed with exit code 1: RuntimeError: no out of memory")
    assert reason("2 problems in the config:\n  - a: b; c\n  - d: e\n", 2) == "refused: a: b; c"
    assert reason("step 3: loss nan\n", 1) == "failed with exit code 1: step 3: loss nan"
    assert reason("", -9) == "failed with exit code -9"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_measures_the_best_and_marks_what_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(subprocess, "Popen", ForkedCommand)
    words = [*TINY, "launch.nproc=2", "output_dir=mine"]
    tuned = tune(words, 4 * GIB)
    good = tuned.fitting[0]
    broken = replace(good, settings={**good.settings, "batch.micro": 0})
    console = Console(width=200, record=True)
    assert measure(tuned, [broken, good], words, None, console) is good
    text = console.export_text()
    assert "1 of 2: parallel.zero=1 batch.micro=0" in text and "refused: batch.micro: 0 is not a number of samples" in text
    assert "tokens/s per process" in text
    assert not list(tmp_path.iterdir()) and not Path("mine").exists()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_one_process_from_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", *TINY, "launch.nproc=1", "trainer.activation=none", "--memory=4", "--measure=1"]) == 0
    out = capsys.readouterr().out
    assert "1 of 1: parallel.zero=3 batch.micro=8 trainer.activation=none: " in out and "Measured: medians" in out
    assert out.splitlines()[-1].endswith("batch.micro=8")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_leaves_nothing_behind(tmp_path: Path, number: signal.Signals, request: pytest.FixtureRequest) -> None:
    brief = Path(tempfile.mkdtemp())  # a socket's path has at most 107 characters, and `tmp_path` takes most of them
    request.addfinalizer(lambda: shutil.rmtree(brief))
    command = [sys.executable, "-m", "meshloom.launch.cli", "tune", *TINY, "launch.nproc=2", "--memory=4", "--measure=3"]
    environment = {**os.environ, "TMPDIR": str(brief), "CUDA_VISIBLE_DEVICES": ""}
    child = ForkedCommand(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    started: list[psutil.Process] = []
    while len(started) < 4 and child.poll() is None:  # the run, the agent, and its two processes
        started = psutil.Process(child.pid).children(recursive=True)
        time.sleep(0.1)
    child.send_signal(number)
    _, err = child.communicate(timeout=120)
    assert child.returncode == 130 and b"stopped, with what it had started" in err
    assert not psutil.wait_procs(started, timeout=10)[1]
    assert not list(brief.glob("meshloom-tune-*"))


def test_gpus_are_asked_what_they_have_and_can(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: int) -> None:
        raise RuntimeError("no driver")

    sizes = [80 * GIB, 40 * GIB]
    monkeypatch.setattr(gpus_module, "get_context", lambda _: multiprocessing.get_context("fork"))  # takes the patches along
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(sizes))
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda index: type("Properties", (), {"total_memory": sizes[index]})()
    )
    for plain in ("it is wrong by 1", None):
        monkeypatch.setattr(gpus_module.swiglu, "unsupported_reason", lambda _, plain=plain: plain)
        with GpusHere() as gpus:
            assert gpus.memory() == 40 * GIB and gpus.fused_swiglu_blocker() == plain
    monkeypatch.setattr(gpus_module.swiglu, "unsupported_reason", lambda _: os._exit(1))
    with GpusHere() as gpus:
        assert gpus.memory() == 40 * GIB
        assert "BrokenProcessPool" in (gpus.fused_swiglu_blocker() or "")
    monkeypatch.setattr(torch.cuda, "get_device_properties", broken)
    with GpusHere() as gpus, pytest.raises(ConfigError, match="--memory: the GPUs here do not answer: no driver"):
        gpus.memory()


def test_fused_swiglu_is_probed_once_and_only_if_it_matters() -> None:
    asked: list[None] = []

    def plain() -> str:
        asked.append(None)
        return "it is wrong by 1"

    tuned = tune([*LLAMA, "launch.nproc=1"], 139 * GIB, fused_swiglu_blocker=plain)
    assert len(asked) == 1 and "SwiGLU is planned as plain: it is wrong by 1" in tuned.notes
    assert not any(one.plan.job.fused for one in tuned.fitting)
    tune([*LLAMA, "launch.nproc=2", "parallel.tp=2"], 139 * GIB, fused_swiglu_blocker=plain)
    assert len(asked) == 1


def test_results_inside_fused_products_need_not_fit() -> None:
    words = [*LLAMA, "launch.nproc=1", "parallel.zero=1", "batch.micro=4", "trainer.activation=none", f"{BUDGET}=null"]
    plain, fused = (tune(words, 139 * GIB, fused_swiglu_blocker=lambda why=why: why).fitting[0] for why in ("no", None))
    assert plain.bytes - fused.bytes == 16 * 32_768 * 8192 * 2  # silu(gate) · up of every layer: the 8.0 GiB that an H200 saved
    limit = (fused.bytes + RESERVE * GIB) / (1 - SHARE) + 1
    assert tune(words, limit, fused_swiglu_blocker=lambda: None).fitting
    with pytest.raises(ConfigError, match="nothing fits"):
        tune(words, limit)


def test_micro_batch_sizes_are_found_without_trying_all() -> None:
    assert [divisors(number) for number in (1, 2, 12, 36, 97)] == [
        [1],
        [1, 2],
        [1, 2, 3, 4, 6, 12],
        [1, 2, 3, 4, 6, 9, 12, 18, 36],
        [1, 97],
    ]
    assert len(divisors(2**40 * 3**2)) == 41 * 3  # a walk up to the number would not end
