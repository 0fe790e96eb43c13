"""Host memory that a run takes, beside what there is: refused by key before it is taken, or warned of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from meshloom.launch import sweep as sweeps
from meshloom.launch import train as command
from meshloom.launch.cli import main
from meshloom.launch.sweep import Outcome
from meshloom.trainer import host_memory
from meshloom.trainer.host_memory import HostBytes, compare_host_memory, host_bytes
from meshloom.trainer.resolve import resolve
from meshloom.trainer.schema import RunConfig
from support.configs import config_of
from support.tiny_run import TINY

LLAMA = ("recipe=llama_1b", "batch.micro=1", "trainer.activation=none", "batch.samples=4", "precision=fp32")
PARAMETERS = 1_498_482_688  # 2 · 128,256 · 2,048 + 16 · (2 · 2,048² + 2 · 2,048 · 512 + 3 · 2,048 · 8,192 + 2 · 2,048) + 2,048


@pytest.fixture(autouse=True)
def _no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "visible_gpus", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def has(monkeypatch: pytest.MonkeyPatch, *, free: int, limit: int) -> None:
    monkeypatch.setattr(host_memory, "available_memory", lambda: free)
    monkeypatch.setattr(host_memory, "memory_limit", lambda: limit)


def taken(config: RunConfig) -> HostBytes:
    found = host_bytes(config, on_gpus=False)
    assert found is not None
    return found


def test_the_state_in_fp32_is_sixteen_bytes_a_parameter() -> None:
    """Weights and gradients of 4 bytes, AdamW's moments of 8, once for each copy: closed forms (ZeRO, arXiv 1910.02054)."""
    for copies, words in ((1, ["launch.nproc=1"]), (2, ["launch.nproc=2", "parallel.zero=0"]), (1, ["launch.nproc=2"])):
        config = config_of(*LLAMA, *words, *([] if copies == 2 else ["parallel.zero=3"]))
        found = taken(config)
        assert found.state == pytest.approx(16 * copies * PARAMETERS, rel=1e-3)
        assert found.planned > found.state


def test_a_pipeline_is_counted_as_all_of_its_stages() -> None:
    whole, cut = (taken(config_of(*LLAMA, *words)) for words in (["launch.nproc=1"], ["launch.nproc=4", "parallel.pp=4"]))
    assert cut.state == pytest.approx(whole.state, rel=1e-3)
    nodes = taken(config_of(*LLAMA, "launch.nproc=2", "launch.nodes=2", "parallel.pp=4"))
    assert nodes.state < cut.state / 2, "the least that two stages hold: which they are is not known yet"


def test_offloading_takes_no_more_where_there_is_no_gpu() -> None:
    """Nothing is pinned then, in buffers of a power of two of bytes; and what goes to a disk is not counted."""
    words = ("launch.nproc=2", "parallel.engine=deepspeed", "parallel.zero=3")
    assert taken(config_of(*LLAMA, *words, "parallel.offload=cpu")) == taken(config_of(*LLAMA, *words))
    swapped = config_of(*LLAMA, *words, "parallel.offload=nvme", "parallel.offload_path=/fast")
    assert host_bytes(swapped, on_gpus=False) is None


def test_it_is_refused_above_the_limit_and_warned_of_above_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(*LLAMA, "launch.nproc=1")
    found = taken(config)
    for free, limit, refused, warned in (
        (found.state - 1, found.state - 1, True, False),
        (0, found.state, False, True),
        (found.planned - 1, found.planned, False, True),
        (found.planned, found.planned, False, False),
    ):
        has(monkeypatch, free=free, limit=limit)
        problems, warning = compare_host_memory(config)
        assert ([problem.key for problem in problems], bool(warning)) == (["model"] * refused, warned)
    has(monkeypatch, free=2**30, limit=2**31)
    told = str(compare_host_memory(config)[0][0])
    assert "22.3 GiB in 1 process, and all memory and swap (of the machine, or its container) are 2.00 GiB" in told
    assert "train on GPUs" in told


def test_beside_gpus_only_what_is_offloaded_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    has(monkeypatch, free=2**30, limit=2**30)
    for visible, usable in ((2, True), (0, True)):  # the latter as on WSL 2 and with ROCm: no files in /dev
        monkeypatch.setattr(host_memory, "visible_gpus", lambda visible=visible: visible)
        monkeypatch.setattr(torch.cuda, "is_available", lambda usable=usable: usable)
        assert compare_host_memory(config_of(*LLAMA, "launch.nproc=2")) == ([], "")
        (problem,), _ = compare_host_memory(config_of(*LLAMA, "launch.nproc=2", "parallel.offload=cpu"))
        assert problem.key == "parallel.offload"


def test_a_model_of_unknown_costs_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    has(monkeypatch, free=0, limit=0)
    own = "model={_target_: my.GPT, layers: 2}"
    assert compare_host_memory(config_of("recipe=quickstart", "data=synthetic", own)) == ([], "")


def test_train_refuses_it_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    has(monkeypatch, free=10, limit=10)
    folder = tmp_path / "run"
    for switches in ([], ["-m"], ["-m", "hydra/launcher=basic"]):
        assert main(["train", *switches, *TINY, "launch.nproc=1", f"output_dir={folder}"]) == 2
        assert "model: no GPU is visible, and weights, gradients and optimizer state take" in capsys.readouterr().err
    assert not folder.exists()


def test_a_machine_that_does_not_run_it_refuses_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Jobs of another launcher ask where they run; processes that another program started are not compared at all."""
    has(monkeypatch, free=10, limit=10)
    launchers = tmp_path / "hydra" / "launcher"
    launchers.mkdir(parents=True)
    (launchers / "elsewhere.yaml").write_text("_target_: hydra._internal.core_plugins.basic_launcher.BasicLauncher\n")
    codes: list[int | None] = []

    def sweep(words: list[str], config_dir: str | None, run: Callable[[list[str]], tuple[int | None, int]]) -> list[Outcome]:
        codes.append(run([*TINY, "launch.nproc=1"])[0])
        return []

    monkeypatch.setattr(sweeps, "run_sweep", sweep)
    switches = ["-m", f"--config-dir={tmp_path}", "hydra/launcher=elsewhere"]
    assert main(["train", *switches, *TINY, "launch.nproc=1"]) == 0
    assert codes == [2], "where the job runs"
    resolved = resolve([*TINY, "launch.nproc=1"], command.RESOLVING)
    assert command.start_problems(resolved)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert command.start_problems(resolved) == []
