"""`meshloom tune` and the prediction of speed where DeepSpeed runs, or where state is on the host or on disk."""

from __future__ import annotations

import importlib.util
import re

import pytest

from meshloom.config.problems import ConfigError
from meshloom.launch.cli import main
from meshloom.launch.planning import make_plan
from meshloom.launch.tune_search import tune
from meshloom.launch.tuning import table_of
from meshloom.models.costs import parameter_count
from meshloom.planner.engines import engine_moved
from meshloom.planner.gpus import GpusHere
from meshloom.planner.step_time import HOST_UPDATE
from meshloom.planner.tables import GIB
from support.plans import LLAMA, SMALL, seconds, tokens_per_second

needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs meshloom[deepspeed]")


@needs_deepspeed
def test_bytes_that_travel_under_deepspeed() -> None:
    """Of two ranks and 4 micro-batches: an all-reduce of fp32 gradients sends 4 bytes a parameter, a scatter 2, a gather 1."""
    words = [*LLAMA, "launch.nproc=2", "batch.micro=1", "parallel.engine=deepspeed"]
    parameters = 1_498_482_688
    for zero, sent in ((1, 4 + 1), (2, 4 * 4 + 1), (3, 4 * (1 + 1 + 2))):
        plan = make_plan([*words, f"parallel.zero={zero}"])
        traffic = engine_moved(plan.parallel)(plan.cost.ranks[0], plan.parallel, plan.layout, plan.job)
        assert traffic.between == pytest.approx(sent * parameters, rel=1e-3), zero
    near = "parallel.deepspeed.config.zero_optimization.zero_hpz_partition_size=2"
    plan = make_plan([*LLAMA, "launch.nproc=4", "batch.micro=1", "parallel.engine=deepspeed", "parallel.zero=3", near])
    traffic = engine_moved(plan.parallel)(plan.cost.ranks[0], plan.parallel, plan.layout, plan.job)
    assert traffic.between == pytest.approx(2 * (2 * 3 / 4 + 2 * 1 / 2 + 4 * 3 / 4) * parameters, rel=1e-3)
    plan.parallel.deepspeed.config["zero_optimization"] = {"zero_quantized_weights": True}
    traffic = engine_moved(plan.parallel)(plan.cost.ranks[0], plan.parallel, plan.layout, plan.job)
    assert traffic.between == pytest.approx(2 * (2 * 1 * 3 / 4 + 4 * 3 / 4) * parameters, rel=1e-3)


@needs_deepspeed
def test_deepspeed_is_predicted_as_it_was_measured() -> None:
    """Llama 1B, compiled, on one H200, tokens/s beside the torch engine's."""
    for zero, ratio in ((1, 57_508 / 59_625), (3, 56_155 / 58_783)):
        words = ["batch.samples=4", "launch.nproc=1", f"parallel.zero={zero}"]
        predicted = tokens_per_second(*words, "parallel.engine=deepspeed") / tokens_per_second(*words)
        assert predicted == pytest.approx(ratio, abs=0.03) and predicted < 1


@needs_deepspeed
def test_an_update_takes_as_long_as_what_holds_the_state() -> None:
    """Offloaded it runs at the host's bandwidth, and on disk it waits for the disk besides."""
    words = ["recipe=llama_1b", "launch.nproc=1", "batch.samples=4", "parallel.engine=deepspeed", "parallel.zero=3"]
    host = make_plan([*words, "parallel.offload=cpu"])
    disk = make_plan([*words, "parallel.offload=nvme", "parallel.offload_path=/fast"])
    parameters = 1_498_482_688
    assert seconds(host) > 40 * parameters / HOST_UPDATE + (host.away.to_host + host.away.from_host) / 27e9
    assert seconds(disk) - seconds(host) == pytest.approx(2 * 16 * parameters / 2e9, rel=0.01)
    torch_host = make_plan([*words[:-2], "parallel.zero=3", "parallel.offload=cpu"])
    assert seconds(torch_host) > 40 * parameters / HOST_UPDATE


OFFLOADED = [*SMALL, "batch.samples=8", "launch.nproc=2", "trainer.activation=full"]


def test_offloaded_state_must_fit_into_the_host(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes of a machine share its memory; where the GPUs here are asked, so is the host."""
    words = [*OFFLOADED, "parallel.offload=cpu", "checkpoint.every=0"]
    tuned = tune(words, 80 * GIB, host=500 * GIB)
    needed = tuned.fitting[0].host
    parameters = parameter_count(tuned.fitting[0].plan.model.shape)
    assert needed >= 16 * parameters / 2
    assert all(one.host <= 250 * GIB for one in tuned.fitting)
    assert tune(words, 80 * GIB, host=2 * needed).fitting
    with pytest.raises(ConfigError, match=r"parallel\.offload: nothing fits into host memory.*parallel\.offload=nvme"):
        tune(words, 80 * GIB, host=2 * needed - 2)

    class Gpus(GpusHere):
        def memory(self) -> float:
            return 80 * GIB

        def fused_swiglu_blocker(self) -> str | None:
            return "no"

    monkeypatch.setattr("meshloom.launch.tuning.GpusHere", Gpus)
    for free, status in ((2 * needed, 0), (2 * needed - 2, 2)):
        monkeypatch.setattr("meshloom.launch.tuning.available_memory", lambda free=free: free)
        assert main(["tune", *words]) == status
        printed = capsys.readouterr()
        assert ("host GiB" in printed.out) is (status == 0) and "disk GiB" not in printed.out
        assert ("are free here" in printed.err) is (status == 2)


def test_without_the_machine_a_note_says_what_its_host_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", *OFFLOADED, "parallel.offload=cpu", "--memory=80"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "host GiB" in out and re.search(r"GiB of host memory on each machine \(.*\), of which --memory says nothing", out)
    assert main(["tune", *OFFLOADED, "--memory=80"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "host GiB" not in out and "disk" not in out
    assert re.search(r"the fastest needs ([\d.]+) GiB of host memory on each machine \(\1 for snapshots of checkpoints\)", out)
    assert main(["tune", *OFFLOADED, "--memory=80", "checkpoint.every=0"]) == 0
    assert "host" not in capsys.readouterr().out


def test_snapshots_must_fit_into_the_host_too() -> None:
    needed = tune(OFFLOADED, 80 * GIB).fitting[0].host
    assert tune(OFFLOADED, 80 * GIB, host=2 * needed).fitting
    with pytest.raises(ConfigError, match=r"checkpoint\.host_memory_gib: nothing fits into host memory") as refusal:
        tune(OFFLOADED, 80 * GIB, host=2 * needed - 2)
    (value,) = re.findall(r"set it to ([\d.]+), ", refusal.value.problems[0].fix)
    fewer = [*OFFLOADED, f"checkpoint.host_memory_gib={value}"]
    assert tune(fewer, 80 * GIB, host=2 * needed - 2).fitting[0].host == needed // 2
    assert tune([*OFFLOADED, "checkpoint.snapshot_folder=/fast"], 80 * GIB, host=2).fitting[0].host == 0


def test_the_way_out_is_one_that_the_engine_takes() -> None:
    def fix(*words: str) -> str:
        with pytest.raises(ConfigError, match="nothing fits") as refusal:
            tune([*SMALL, "launch.nproc=2", "batch.samples=8", "trainer.activation=full", *words], 3 * GIB)
        return refusal.value.problems[0].fix

    assert fix() == "use more processes, parallel.tp=2 or parallel.offload=cpu"
    assert fix("parallel.tp=2") == "use more processes or parallel.tp=4"
    assert fix("parallel.offload=cpu") == "use more processes"


@needs_deepspeed
def test_the_way_out_is_one_that_deepspeed_takes() -> None:
    words = ["parallel.engine=deepspeed", "launch.nproc=2", "batch.samples=8", "trainer.activation=full"]
    with pytest.raises(ConfigError) as refusal:
        tune([*SMALL, *words], 3 * GIB)
    fix = refusal.value.problems[0].fix
    assert fix == "use more processes, parallel.offload=cpu or parallel.engine=torch parallel.tp=2"
    nvme = ["parallel.zero=3", "parallel.offload=nvme", "parallel.offload_path=/fast"]
    tuned = tune([*SMALL, *words, *nvme], 80 * GIB)
    assert "on disk on each machine" in " ".join(tuned.notes)
    assert any(column.header == "disk GiB" for column in table_of(tuned).columns)


@needs_deepspeed
def test_one_rank_of_deepspeed_has_stages_that_differ() -> None:
    words = [
        *SMALL,
        "launch.nproc=1",
        "batch.samples=4",
        "batch.micro=4",
        "trainer.activation=full",
        "parallel.engine=deepspeed",
    ]
    tuned = tune(words, 80 * GIB)
    assert {one.settings["parallel.zero"] for one in tuned.fitting} == {1, 2, 3}
    assert len({one.bytes for one in tuned.fitting}) == 3


def test_one_gpu_that_offloads_is_tuned_over_its_stages() -> None:
    tuned = tune(["recipe=llama_3b", "launch.nproc=1", "parallel.offload=cpu"], 24 * GIB)
    assert {one.settings["parallel.zero"] for one in tuned.fitting} == {2, 3}, "ZeRO-1 adds gradients up on the GPU"
