"""The wrapper around torchrun: exit codes come through, and the cluster's signals reach the workers instead of killing them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from torch.distributed.elastic.multiprocessing.api import SignalException

from meshloom.config.problems import Problem
from meshloom.launch import agent, train
from meshloom.launch.torchrun import PreparedAgent, TorchRun, environment
from meshloom.trainer.signals import STOPPING
from support.forked_commands import ForkedCommand, run_forked

PATIENCE = 280.0  # seconds: torchrun and its workers begin in two, and in a hundred where the cores are shared
WORKER = """
import os, signal, sys, time
folder, mode = sys.argv[1:]
rank = os.environ["RANK"]
if mode == "fail":
    sys.exit(7 if rank == "1" else 0)
asked = []
signal.signal(signal.SIGUSR1, lambda *_: asked.append(1))
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
open(f"{folder}/ready-{rank}", "w").close()
deadline = time.monotonic() + 300
while mode == "stubborn" and time.monotonic() < deadline:
    time.sleep(0.05)
while not asked and time.monotonic() < deadline:
    time.sleep(0.05)
time.sleep(0.3)  # the save
open(f"{folder}/saved-{rank}", "w").close()
sys.exit(0 if asked else 1)
"""


def start(folder: Path, mode: str) -> subprocess.Popen[str]:
    script = folder / "worker.py"
    script.write_text(WORKER)
    command = [
        sys.executable,
        "-m",
        "meshloom.launch.torchrun",
        "--standalone",
        "--nproc-per-node=2",
        str(script),
        str(folder),
        mode,
    ]
    return ForkedCommand(command, stderr=subprocess.PIPE, text=True)


def runs(number: int) -> bool:
    """Return whether a process is there, and not only because nobody has waited for it."""
    try:
        return psutil.Process(number).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def ready(folder: Path, process: subprocess.Popen[str]) -> list[psutil.Process]:
    """torchrun's agent and its workers, as soon as both of these have their handlers."""
    deadline = time.monotonic() + PATIENCE
    while len(list(folder.glob("ready-*"))) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    return psutil.Process(process.pid).children(recursive=True)


@pytest.mark.timeout(900)
def test_exit_code_of_the_failed_worker(tmp_path: Path) -> None:
    process = start(tmp_path, "fail")
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 7, errors


@pytest.mark.timeout(900)
def test_sigterm_lets_the_workers_save_and_end(tmp_path: Path) -> None:
    process = start(tmp_path, "wait")
    ready(tmp_path, process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, errors
    assert len(list(tmp_path.glob("saved-*"))) == 2


@pytest.mark.timeout(900)
def test_a_second_interrupt_ends_workers_that_would_not_stop(tmp_path: Path) -> None:
    process = start(tmp_path, "stubborn")
    workers = ready(tmp_path, process)
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    while STOPPING not in process.stderr.readline():  # until it has heard the first
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130, errors
    assert not any(runs(worker.pid) for worker in workers) and not list(tmp_path.glob("saved-*"))


def test_ending_the_workers_at_once_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGUSR1)

    def ended(_: list[str]) -> None:
        raise SignalException("got signal: 15", sigval=signal.SIGTERM)

    monkeypatch.setattr("meshloom.launch.agent._run", ended)
    try:
        assert agent.main([]) == 128 + signal.SIGTERM
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_environment_shares_the_cores_and_isolates_restarts(monkeypatch: pytest.MonkeyPatch) -> None:
    cores = len(os.sched_getaffinity(0))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    plain = environment(["--nproc-per-node=1", "--max-restarts=0", "-m", "x"])
    restarting = environment([f"--nproc-per-node={cores}", "--max-restarts=3"])
    assert plain["OMP_NUM_THREADS"] == str(cores) and "TORCH_DISABLE_SHARE_RDZV_TCP_STORE" not in plain
    assert restarting["OMP_NUM_THREADS"] == "1" and restarting["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"


def test_agent_started_early_runs_with_the_later_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "worker.py"
    script.write_text("import os, sys; open(f'{sys.argv[1]}/{os.environ[\"SAID_LATER\"]}', 'w').close(); sys.exit(5)")
    prepared = PreparedAgent()
    monkeypatch.setenv("SAID_LATER", "yes")
    assert TorchRun(["--standalone", "--nproc-per-node=1", str(script), str(tmp_path)]).run(prepared) == 5
    assert (tmp_path / "yes").exists()
    prepared.dismiss()  # it was used: nothing happens


def test_an_agent_that_has_died_is_reported_by_its_code() -> None:
    prepared = PreparedAgent()
    prepared.process.kill()
    prepared.process.wait()
    assert TorchRun(["--standalone", "--nproc-per-node=1", "nothing.py"]).run(prepared) == 128 + signal.SIGKILL


def test_an_agent_whose_launcher_is_gone_ends() -> None:
    begin = "from meshloom.launch.torchrun import PreparedAgent; print(PreparedAgent().process.pid, flush=True)"
    launcher = [sys.executable, "-c", f"import os; {begin}; os._exit(9)"]
    told = run_forked(launcher, PATIENCE)
    assert told.returncode == 9
    deadline = time.monotonic() + PATIENCE
    while runs(int(told.stdout)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not runs(int(told.stdout))


LOSES_ITS_STORE = """
import datetime, os, sys
from meshloom.launch.agent import hush_torch
if sys.argv[1] == "hushed":
    hush_torch()
from torch.distributed import TCPStore
listening, telling = os.pipe()
if os.fork() == 0:
    store = TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    os.write(telling, str(store.port).encode())
    store.wait(["lost"])
    os._exit(0)
store = TCPStore("127.0.0.1", int(os.read(listening, 9)), None, False, timeout=datetime.timedelta(seconds=60))
store.set("lost", "")
try:
    store.wait(["never"])
except RuntimeError:
    print("lost", flush=True)
os._exit(0)
"""


@pytest.mark.parametrize(("mode", "traces"), [("hushed", False), ("as it is", True)])
def test_a_lost_store_prints_no_trace_of_cpp(mode: str, traces: bool) -> None:
    """The second case notices a PyTorch that prints none by itself."""
    variables = {name: value for name, value in os.environ.items() if name != "TORCH_CPP_LOG_LEVEL"}
    command = [sys.executable, "-c", LOSES_ITS_STORE, mode]
    found = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120, check=True)
    assert found.stdout == "lost\n" and ("frame #0" in found.stderr) is traces


@pytest.mark.parametrize(("override", "several"), [("launch.nproc=2", True), ("launch.nproc=1", False)])
def test_agent_starts_before_the_build_and_ends_on_refusal(
    override: str, several: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = list[psutil.Process]()

    def building(*_: object) -> list[Problem]:
        seen.extend(child for child in psutil.Process().children() if "--when-told" in child.cmdline())
        return [Problem("model", "can't be built", "choose another")]

    monkeypatch.setattr("meshloom.trainer.trial_build.build_problems", building)
    assert train.main([override]) == 2
    assert "model: can't be built" in capsys.readouterr().err
    assert len(seen) == several and not any(agent.is_running() for agent in seen)
