"""`meshloom plan … cluster=…`: seconds, cost and the fastest layouts from the command line, without PyTorch."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from meshloom.config.problems import ConfigError, Problem
from meshloom.launch.calibrate import data_sheet
from meshloom.launch.cli import main
from meshloom.launch.plan_best import best_layouts, reasons
from meshloom.launch.plan_cluster import split_words
from meshloom.launch.planning import resolve_plan
from meshloom.planner.cluster import load_cluster
from meshloom.planner.cost import RankCost
from meshloom.planner.prediction import usable_bytes
from meshloom.planner.search import larger_sizes, search
from meshloom.trainer.typed import plain_config

SMALL = ["recipe=llama_1b", "batch.samples=64"]


def said(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["plan", *words]) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["plan", *words]) == 2
    return capsys.readouterr().err


def test_a_plan_tells_seconds_days_and_cost(capsys: pytest.CaptureFixture[str]) -> None:
    out = said(capsys, *SMALL, "cluster=h200x16", "cluster.price=2", "--parts")
    for part in ("16 processes", "± 25%", "tokens/s a GPU", "GPU-hours", "at 2 a GPU-hour", "products", "slowest rank"):
        assert part in out
    found = json.loads(said(capsys, *SMALL, "cluster=h200x16", "cluster.price=2", "--json"))
    assert found["cost"] == pytest.approx(2 * found["gpu_hours"]) and found["gpu_hours"] == pytest.approx(
        24 * 16 * found["days"]
    )
    tokens = 64 * 8192 / found["seconds_per_step"] / 16
    assert tokens == pytest.approx(found["tokens_per_second_per_gpu"])
    assert sum(found["parts_seconds"].values()) == pytest.approx(found["seconds_per_step"])
    assert found["days"] == pytest.approx(30e9 / (16 * tokens) / 86400)


def test_figures_for_a_program_come_with_problems_and_drawings(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words, svg = ["recipe=llama_1b", "trainer.activation=full", "batch.micro=1", "cluster=h200x2", "--json"], tmp_path / "a.svg"
    (problem,) = json.loads(said(capsys, *words, "cluster.memory=9"))["problems"]
    assert problem.startswith("does not fit") and not svg.exists()
    assert "--draw-pipeline: there is no pipeline" in refused(capsys, *words, f"--draw-pipeline={svg}")
    assert main(["plan", *words, "parallel.pp=2", "trainer.compile=false", f"--draw-pipeline={svg}"]) == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["fits"] and "</svg>" in svg.read_text() and "drew" in told.err


def test_times_of_whole_matrix_optimizers_are_caveated(capsys: pytest.CaptureFixture[str]) -> None:
    muon = ["recipe=llama_1b", "optim=muon", "cluster=h100x2"]
    for words in ([], ["--best", "1"]):
        assert "what optim=muon computes and sends for whole matrices was never held" in said(capsys, *muon, *words)
    assert "whole matrices" not in said(capsys, *muon[:1], *muon[2:])


def test_float8_is_told_where_it_would_be_faster(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["recipe=llama_8b", "batch.samples=64", "--best", "1"]
    assert "trainer.float8=tensorwise, which is recipe" in said(capsys, *words, "cluster=h100x8")
    assert "float8" not in said(capsys, *words, "cluster=a100x8"), "it has none"
    assert "never changed" not in said(capsys, *words, "cluster=h100x8", "trainer.float8=tensorwise")


def test_mistakes_are_told_by_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert "times are of a cluster, and none is chosen" in refused(capsys, *SMALL, "--best", "3")
    assert "--best: -1 is not a number of layouts" in refused(capsys, *SMALL, "cluster=h100", "--best", "-1")
    for length in ("-350", "nan", "0"):
        told = refused(capsys, *SMALL, "cluster=h100", f"--documents={length}")
        assert f"--documents: {length} is no length" in told
    told = refused(capsys, *SMALL, "cluster=h100", "--best=1", "--draw-step=a.svg", "--draw-pipeline=b.svg")
    assert "--draw-step: nothing is drawn with --best" in told and "--draw-pipeline: nothing" in told
    assert "8 GPUs for 16 processes" in refused(capsys, *SMALL, "cluster=h100", "launch.nproc=16")
    told = refused(capsys, "recipe=llama_70b", "cluster=a100x2", "parallel.offload=none", "--best", "1")
    assert "nothing fits 2 × NVIDIA A100" in told and "cluster.gpus=16 is enough: tp 4" in told
    assert "554.9 GiB a GPU (optimizer" in told
    told = refused(capsys, *SMALL, "cluster=h100x1", "cluster.memory=14", "cluster.host_memory=16", "--best", "1")
    assert re.search(r"offload cpu .*, takes [\d.]+ GiB of a node's host, which has 16, for what it offloads, beside", told), (
        told
    )


def test_a_refused_plan_names_what_is_there_at_once() -> None:
    """Gradients of all layers and activations of all layers never are."""
    moments = {"gradients": 50, "held": 0, "activations": 50, "working": 4, "late": 3, "update": 20, "buffers": 1}
    rank = RankCost([range(1)], 1, 0, 1.0, weights=10, gathered=1, optimizer=2, **moments, needs=None)  # type: ignore[arg-type]
    always = {"weights": 10, "gathered": 1, "optimizer": 2}
    assert rank.at_peak == always | {"gradients": 0, "activations": 50, "working": 4}
    assert replace(rank, gradients=52).at_peak == always | {"gradients": 52, "working": 3}
    assert replace(rank, update=54).at_peak == always | {"update": 54, "buffers": 1}
    assert [each.total for each in (rank, replace(rank, gradients=52), replace(rank, update=54))] == [67, 68, 68]


def test_sizes_of_a_larger_cluster_reach_the_largest() -> None:
    """In whole nodes, but below one."""
    h100 = load_cluster(["cluster=h100"])
    assert larger_sizes(replace(h100, gpus=2), 96) == [4, 8, 16, 24, 32, 48, 64, 96]
    alone = larger_sizes(replace(h100, gpus=1000, gpus_per_node=1))
    assert alone[0] == 1024 and alone[-1] == 16384


def test_a_larger_cluster_is_named_for_what_is_typed(capsys: pytest.CaptureFixture[str]) -> None:
    """Layouts of a larger cluster are checked at its own size: tp 8 divides no two GPUs. What is typed is not changed."""
    words = ["recipe=llama_70b", "parallel.offload=none", "parallel.zero=3", "trainer.activation=none", "--best", "1"]
    told = refused(capsys, *words, "cluster=a100x2")
    assert "cluster.gpus=32 is enough: tp 8 ZeRO-3 micro 1 keep all" in told
    assert "tp 8 · ZeRO-3" in said(capsys, *words, "cluster=a100x32")


def test_the_fastest_layouts_fit_and_are_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    words, cluster = split_words([*SMALL, "cluster=a100x8"])
    assert cluster is not None
    resolved = resolve_plan(words)
    resolved.refuse()
    best = best_layouts(resolved, words, cluster, 4)
    times = [one.prediction.seconds for one in best.candidates]
    assert len(times) == 4 and times == sorted(times)
    assert len({one.layout for one in best.candidates}) == 4
    assert all(one.prediction.bytes <= usable_bytes(79.2 * 2**30) for one in best.candidates)
    assert len(list(reasons(best))) == 3
    words = [*words, "parallel.tp=1", "batch.micro=4"]
    held = best_layouts(resolve_plan(words), words, cluster, 2)
    assert all(one.settings["parallel.tp"] == 1 and one.settings["batch.micro"] == 4 for one in held.candidates)
    assert held.notes == ["batch.micro, parallel.tp as typed"], held.notes


def test_layouts_that_the_trainer_refuses_are_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """If its own checks take none of the layouts that fit, it tells their problems in place of an empty table."""
    from meshloom.launch import plan_best

    problem = Problem("trainer.float8", "not like this", "leave it out")
    monkeypatch.setattr(plan_best, "checked_config", lambda config, *_, **__: (config, [problem]))
    told = refused(capsys, *SMALL, "cluster=h100x1", "--best", "1", "--parts")
    assert "trainer.float8: not like this; leave it out" in told


def test_the_printed_line_has_the_printed_speed(capsys: pytest.CaptureFixture[str]) -> None:
    best = json.loads(said(capsys, *SMALL, "cluster=h100", "--best", "2", "--json"))["best"][0]
    words = shlex.split(best["command"])
    assert words[:2] == ["meshloom", "train"]
    again = json.loads(said(capsys, *words[2:], "cluster=h100", "--json"))
    assert again["seconds_per_step"] == pytest.approx(best["seconds_per_step"], rel=1e-6)


def test_experts_of_a_mixture_are_dealt_to_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    """Qwen3's 30 B fit eight GPUs faster that way; a size that is typed stays."""
    mixture = ["recipe=llama_8b", "model=qwen3_30b_a3b", "cluster=h100", "batch.samples=256", "trainer.activation=full"]
    out = said(capsys, *mixture, "--best", "1")
    assert "ep 8 ·" in out and "parallel.ep=8" in out
    assert "parallel.ep=8" not in said(capsys, *mixture, "parallel.ep=1", "--best", "1")


def test_a_bound_never_drops_the_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    """The search with bounds finds what planning everything finds."""
    from meshloom.launch import plan_best

    words, cluster = split_words([*SMALL, "cluster=a100x8"])
    assert cluster is not None
    config = resolve_plan(words).config
    question = plan_best._question(config, replace(cluster, gpus=8), {}, None)
    found = search(question, 3)
    everything = search(question, 10_000)
    assert [one.settings for one in found.best] == [one.settings for one in everything.best[:3]]


def test_a_large_plan_imports_no_torch(tmp_path: Path) -> None:
    program = (
        "import sys; from meshloom.launch.cli import main\n"
        "code = main('plan recipe=llama_8b cluster=h100 --best 2 --json'.split())\n"
        "print(code, 'torch' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stderr.split() == ["0", "False"] and len(json.loads(done.stdout)["best"]) == 2


@pytest.mark.parametrize(
    ("gpu", "memory", "cluster"),
    [
        ("NVIDIA H200", 139.8, "h200"),
        ("NVIDIA H100 80GB HBM3", 79.2, "h100"),
        ("NVIDIA A100-SXM4-80GB", 79.3, "a100"),
        ("AMD Instinct MI250X / MI250", 64.0, "mi250x"),
    ],
)
def test_calibrate_knows_a_gpu_by_a_word_of_its_name(gpu: str, memory: float, cluster: str) -> None:
    assert data_sheet(gpu, memory) == load_cluster([f"cluster={cluster}"])


@pytest.mark.parametrize(
    ("gpu", "memory"),
    [
        ("NVIDIA GH200 480GB", 95.0),
        ("NVIDIA GB200", 184.0),
        ("NVIDIA A100-SXM4-40GB", 39.4),
        ("NVIDIA H100 NVL", 93.1),
        ("NVIDIA H100 PCIe", 79.2),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", 9.5),
    ],
)
def test_calibrate_asks_for_the_data_sheet_of_another_gpu(gpu: str, memory: float) -> None:
    with pytest.raises(ConfigError, match="as --base") as refused:
        data_sheet(gpu, memory)
    assert gpu in str(refused.value)


def test_a_processor_can_be_calibrated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MESHLOOM_CACHE", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert main(["calibrate", "--as", "h100", "--cpu"]) == 2 and main(["calibrate", "--as", "mine"]) == 2
    assert main(["calibrate", "--as", "mine", "--cpu"]) == 0
    assert "use it as cluster=mine" in capsys.readouterr().out
    words, cluster = split_words(["recipe=quickstart", "cluster=minex4"])
    assert cluster is not None and cluster.calibrated and words[-1:] == ["launch.nproc=4"]
    words, cluster = split_words(["recipe=quickstart", "cluster=minex16"])  # a node has as many as the data sheet says
    assert words[-2:] == ["launch.nodes=2", "launch.nproc=8"]
    out = said(capsys, "recipe=quickstart", "cluster=minex1", "model.vocabulary=256")
    assert "± 10% (measured on these machines)" in out
    out = said(capsys, "recipe=quickstart", "cluster=minex4", "model.vocabulary=256")
    assert "± 25% (kernels measured, not all links" in out


def test_a_run_is_held_against_its_metrics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*SMALL, "batch.micro=4", "trainer.activation=none"]
    config = resolve_plan([*words, "launch.nproc=2"]).config
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(plain_config(config)))
    rows = [{"step": step, "step_seconds": 5.0, "tokens_per_second": 64 * 8192 / 5.0, "memory_gib": 50.0} for step in range(9)]
    rows[0]["step_seconds"] = 60.0  # the compiler's
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    found = json.loads(said(capsys, "--against", str(tmp_path), "cluster=h200x2", "--json"))
    assert found["measured"] == {"seconds": 5.0, "tokens_per_second": 64 * 8192 / 10.0, "memory": 50.0, "steps": 6}
    planned = json.loads(said(capsys, *words, "cluster=h200x2", "--json"))
    assert found["predicted"]["seconds_per_step"] == pytest.approx(planned["seconds_per_step"])
    short = json.loads(said(capsys, "--against", str(tmp_path), "cluster=h200x2", "--documents=512", "--json"))["predicted"]
    assert short["parts_seconds"]["attention"] < found["predicted"]["parts_seconds"]["attention"] / 2
    assert "off by" in said(capsys, "--against", str(tmp_path), "cluster=h200x2")
    assert "can't be read" in refused(capsys, "--against", str(tmp_path / "nowhere"), "cluster=h200x2")


def test_a_run_of_an_older_version_is_held_against_what_it_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its rows lack a number, and its config has a class under its former name and lacks a key."""
    config = plain_config(resolve_plan([*SMALL, "batch.micro=4", "trainer.activation=none", "launch.nproc=2"]).config)
    config["model"]["_target_"] = "meshloom.models.llama.Llama"
    del config["trainer"]["compare_replicas_every"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    words = ("--against", str(tmp_path), "cluster=h200x2")
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": {step}, "tokens_per_second": 800.0}}\n' for step in range(9)))
    out = said(capsys, *words)
    assert "tokens/s a GPU" in out and "400" in out and not re.search("^ *a step ", out, re.M) and "has no step_seconds" in out
    assert json.loads(said(capsys, *words, "--json"))["measured"]["seconds"] is None
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    assert "no steps with step_seconds or tokens_per_second in metrics.jsonl" in refused(capsys, *words)


def test_tune_searches_the_layouts_of_a_cluster(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", *SMALL, "cluster=h200x2"]) == 0
    out = capsys.readouterr().out
    assert "Fastest first, by prediction" in out and "tp 2" in out and "pp 2" in out
    line = shlex.split(out.splitlines()[-1])
    assert line[:2] == ["meshloom", "train"] and "launch.nproc=2" in line
    assert main(["tune", *SMALL, "cluster=h200x2", "--memory=80"]) == 2
    assert "give cluster.memory=80" in capsys.readouterr().err
