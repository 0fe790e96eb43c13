"""Kernels compiled beside a run's beginning: once for a machine, by whoever begins first, and never in the run's way."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from meshloom.kernels import driver, precompile
from meshloom.optim.optimizers.matrix_config import MuonConfig
from meshloom.parallel import engines
from meshloom.parallel.config import ParallelConfig
from meshloom.parallel.engine import EngineSettings
from support.models import decoder

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MESHLOOM_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were one, for processes that do nothing with it."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)  # pyright: ignore[reportUnknownArgumentType, reportUnknownLambdaType]
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)  # pyright: ignore[reportUnknownArgumentType, reportUnknownLambdaType]
    monkeypatch.setattr(driver, "shared", lambda _: True)  # pyright: ignore[reportUnknownArgumentType, reportUnknownLambdaType]


class Noted:
    """Work that notes by whom it was done."""

    def __init__(self, folder: Path, seconds: float = 0.0) -> None:
        self.folder, self.seconds = folder, seconds

    def __call__(self, device: torch.device) -> None:
        time.sleep(self.seconds)
        (self.folder / f"by-{os.getpid()}-{time.monotonic_ns()}").touch()

    def times(self) -> list[int]:
        return [int(note.name.split("-")[1]) for note in self.folder.glob("by-*")]


def test_a_process_of_its_own_compiles_and_the_run_waits_for_it(gpu: None, tmp_path: Path) -> None:
    work = Noted(tmp_path, 0.5)
    precompile.start({"kernel": work})
    precompile.wait("kernel", work, CPU)
    (process,) = work.times()
    assert process != os.getpid() and not multiprocessing.active_children()


def test_compiled_kernels_are_not_compiled_again(gpu: None, tmp_path: Path) -> None:
    work = Noted(tmp_path)
    for _ in range(2):
        precompile.wait("kernel", work, CPU)
    precompile.start({"kernel": work})
    assert work.times() == [os.getpid()] and not multiprocessing.active_children()


def test_other_versions_and_other_kernels_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = Noted(tmp_path)
    precompile.wait("kernel", work, CPU)
    precompile.wait("another", work, CPU)
    monkeypatch.setattr("importlib.metadata.version", lambda _: "1.2.3")  # pyright: ignore[reportUnknownArgumentType, reportUnknownLambdaType]
    precompile.wait("kernel", work, CPU)
    assert len(work.times()) == 3


def test_a_kernel_that_fails_is_left_to_its_use(tmp_path: Path) -> None:
    def fails(device: torch.device) -> None:
        raise RuntimeError("not for this GPU")

    precompile.wait("kernel", fails, CPU)
    work = Noted(tmp_path)
    precompile.wait("kernel", work, CPU)  # it was not taken for compiled
    assert work.times() == [os.getpid()]


def test_a_process_that_hangs_is_not_waited_for_for_ever(gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precompile, "PATIENCE", 0.2)
    precompile.start({"kernel": Noted(tmp_path, 600.0)})
    work = Noted(tmp_path)
    precompile.wait("kernel", work, CPU)
    assert work.times() == [os.getpid()] and not multiprocessing.active_children()


PROGRAM = """
import os, sys, time
import torch
from meshloom.kernels import driver, precompile
torch.cuda.device_count = lambda: 1
torch.cuda.set_device = lambda _: None
driver.shared = lambda _: True
def work(device):
    print(os.getpid(), file=open(sys.argv[1] + ".new", "w"))
    os.rename(sys.argv[1] + ".new", sys.argv[1])
    time.sleep(600)
precompile.start({"kernel": work})
time.sleep(600)
"""


def test_compilers_end_with_a_run_that_is_killed(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    run = subprocess.Popen([sys.executable, "-c", PROGRAM, str(note)])
    while not note.exists():
        assert run.poll() is None
        time.sleep(0.02)
    compiling = psutil.Process(int(note.read_text()))
    run.kill()
    run.wait()
    _, left = psutil.wait_procs([compiling], 60.0)
    for process in left:
        process.kill()
    assert not left


def test_a_machine_that_forks_no_more_is_no_obstacle(gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> int:
        raise BlockingIOError("too many processes")

    monkeypatch.setattr(os, "fork", refuse)
    work = Noted(tmp_path)
    precompile.start({"kernel": work})
    precompile.wait("kernel", work, CPU)
    assert work.times() == [os.getpid()]


def test_a_cache_that_machines_share_holds_a_note_of_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = Noted(tmp_path)
    precompile.wait("kernel", work, CPU)
    monkeypatch.setattr("platform.node", lambda: "another")
    precompile.wait("kernel", work, CPU)
    assert len(work.times()) == 2


def test_a_gpu_for_one_process_is_left_to_the_run(gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "shared", lambda _: False)  # pyright: ignore[reportUnknownArgumentType, reportUnknownLambdaType]
    work = Noted(tmp_path)
    precompile.start({"kernel": work})
    precompile.wait("kernel", work, CPU)
    assert work.times() == [os.getpid()]


def test_nothing_is_forked_from_a_process_that_uses_a_gpu(gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "began", lambda: True)
    precompile.start({"kernel": Noted(tmp_path)})
    assert not multiprocessing.active_children()


def test_a_cache_that_cannot_be_written_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MESHLOOM_CACHE", str(tmp_path / "file"))
    precompile.wait("kernel", Noted(tmp_path), CPU)


@pytest.mark.parametrize(
    ("parallel", "settings", "kernels"),
    [
        (ParallelConfig(), EngineSettings(precision="bf16", seq_len=128), 3),
        (ParallelConfig(), EngineSettings(policies=("selective", "none"), precision="bf16", seq_len=128), 3),
        (ParallelConfig(tp=2), EngineSettings(precision="bf16", seq_len=128), 2),
        (ParallelConfig(), EngineSettings(precision="bf16", seq_len=128, float8="tensorwise"), 2),
        (ParallelConfig(), EngineSettings(precision="fp32", seq_len=128), 0),
        (ParallelConfig(), EngineSettings(precision="bf16"), 0),
    ],
)
def test_kernels_that_a_run_will_need_are_compiled(
    parallel: ParallelConfig, settings: EngineSettings, kernels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[str] = []
    monkeypatch.setattr(engines.precompile, "start", begun.extend)
    with torch.device("meta"):
        model = decoder(dim=256, layers=1, heads=4, kv_heads=2, ffn_dim=512, vocabulary=64)
    engines.start_compiling(model, parallel, settings)
    assert len(begun) == kernels
    begun.clear()
    engines.start_compiling(model, parallel, settings, MuonConfig())
    assert len(begun) == (kernels + 1 if kernels else 0)
