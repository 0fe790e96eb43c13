"""Ranks that are forked from a process with everything imported: they behave as if each had been started by itself."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, cast

import psutil
import pytest
import torch
from torch.distributed.launcher.api import LaunchConfig
from torch.multiprocessing import ProcessContext

from meshloom.kernels import driver
from meshloom.launch import agent, forked
from meshloom.launch.exit_codes import HUNG
from meshloom.launch.torchrun import TorchRun
from meshloom.trainer.watch.incidents import read_incidents
from support.forked_commands import ForkedCommand, run_forked

PATIENCE = 280.0  # seconds: some, as a rule
TINY = ["model.layers=1", "data.seq_len=64", "batch.samples=4", "batch.micro=2", "logging.progress=false"]
SMALL = ["recipe=quickstart", "data=synthetic", "trainer.tokens=null", "trainer.eval_every=0", *TINY]


@pytest.fixture
def launcher(tmp_path: Path, request: pytest.FixtureRequest) -> Generator[subprocess.Popen[str]]:
    """A long run of two ranks. Its launcher is forked, too, unless a test's parameter is the class to start it with."""
    line = [*SMALL, "launch.nproc=2", "launch.max_restarts=0", "trainer.steps=100000", "checkpoint.every=0"]
    line.append(f"output_dir={tmp_path}")
    command = [sys.executable, "-m", "meshloom.launch.cli", "train", *line]
    process = getattr(request, "param", ForkedCommand)(command, stderr=subprocess.PIPE, text=True)
    yield process
    if process.poll() is None:
        process.terminate()
        process.communicate()


def ranks(launcher: subprocess.Popen[str], folder: Path) -> list[psutil.Process]:
    """The ranks of a run, as soon as it has made a step."""
    deadline = time.monotonic() + PATIENCE
    while not (folder / "metrics.jsonl").exists():
        assert launcher.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    (above,) = psutil.Process(launcher.pid).children()
    (server,) = [child for child in above.children() if any("multiprocessing.forkserver" in word for word in child.cmdline())]
    return server.children()


def is_told_to_end(stopped: psutil.Process) -> bool:
    """Return whether a SIGTERM waits for a stopped process to go on."""
    status = Path(f"/proc/{stopped.pid}/status").read_text()
    (pending,) = re.findall(r"^ShdPnd:\s*(\w+)", status, re.MULTILINE)
    return bool(int(pending, 16) >> (signal.SIGTERM - 1) & 1)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("launcher", [subprocess.Popen], indirect=True, ids=["as a user starts it"])
def test_ranks_are_forked_and_train(launcher: subprocess.Popen[str], tmp_path: Path) -> None:
    first, second = ranks(launcher, tmp_path)
    server = first.parent()
    assert server is not None and second.parent() == server
    server.terminate()  # as by a cluster that tells every process: it is needed until its ranks have ended
    launcher.send_signal(signal.SIGTERM)
    _, errors = launcher.communicate(timeout=PATIENCE)
    assert launcher.returncode == 0, errors
    assert "asked to stop at step" in errors


@pytest.mark.timeout(900)
def test_a_killed_rank_ends_the_run_with_its_code(launcher: subprocess.Popen[str], tmp_path: Path) -> None:
    first, second = ranks(launcher, tmp_path)
    first.suspend()  # or it may fail, too, before the agent has looked
    second.kill()
    assert launcher.stderr is not None
    errors = launcher.stderr.readline()
    while "was killed" not in errors:
        assert "Traceback" not in errors and errors, errors
        errors += launcher.stderr.readline()
    assert re.search(rf"^rank [01] \(.+, pid {second.pid}\) was killed by SIGKILL in .+ step \d+", errors, re.MULTILINE), errors
    while not is_told_to_end(first):
        assert launcher.poll() is None, errors
        time.sleep(0.05)
    first.resume()
    _, rest = launcher.communicate(timeout=PATIENCE)
    assert launcher.returncode == 128 + signal.SIGKILL, errors + rest
    (incident,) = read_incidents(tmp_path)
    assert incident["kind"] == "death" and incident["pid"] == second.pid and incident["details"]["code"] == 137
    assert "ProcessExitedException" not in errors + rest  # which says nothing of the rank


@pytest.mark.timeout(900)
def test_a_stopped_rank_is_named_and_ends_the_run(launcher: subprocess.Popen[str], tmp_path: Path) -> None:
    running = ranks(launcher, tmp_path)
    known = {row["pid"]: row["rank"] for row in json.loads((tmp_path / "ranks.json").read_text())}
    assert sorted(known) == sorted(rank.pid for rank in running)
    running[1].suspend()
    _, errors = launcher.communicate(timeout=PATIENCE)
    assert launcher.returncode == HUNG, errors
    assert f"run ended: rank {known[running[1].pid]} (" in errors and f"pid {running[1].pid}) is stopped (SIGSTOP)" in errors
    assert "Traceback" not in errors and not any(rank.is_running() for rank in running)
    incidents = list(read_incidents(tmp_path))
    assert [incident["kind"] for incident in incidents] == ["hang", "end"] and incidents[0]["pid"] == running[1].pid


@pytest.mark.timeout(900)
@pytest.mark.parametrize("killed", ["agent", "launcher"])
def test_ranks_end_if_those_above_are_killed(launcher: subprocess.Popen[str], tmp_path: Path, killed: str) -> None:
    running = ranks(launcher, tmp_path)
    (above,) = psutil.Process(launcher.pid).children()
    if killed == "agent":
        running[1].suspend()
    (above if killed == "agent" else launcher).kill()
    _, left = psutil.wait_procs(running, PATIENCE)
    for rank in left:
        rank.kill()
    assert not left
    launcher.communicate(timeout=PATIENCE)
    assert launcher.returncode == (128 + signal.SIGKILL if killed == "agent" else -signal.SIGKILL)


@pytest.mark.timeout(900)
def test_rank_that_refuses_its_config_sets_the_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", ForkedCommand)
    line = [*SMALL, "precision=half", f"output_dir={tmp_path / 'run'}"]
    assert TorchRun(["--standalone", "--nproc-per-node=2", "-m", "meshloom.launch.rank", *line]).run() == 2


PROGRAM = """
import atexit, json, os, sys
from meshloom.launch import forked, preload, rank
import torch
def fake(arguments):
    atexit.register(lambda: open(f"{folder}/left", "w").close())
    told = {"later": os.environ["LATER"], "rank": os.environ["RANK"]}
    told |= {"threads": torch.get_num_threads(), "arguments": arguments,
        "changed": os.environ["CHANGED"], "by the line": sys.stdout.line_buffering}
    open(f"{folder}/told", "w").write(json.dumps(told))
    if how == "raises":
        raise ValueError("no such thing")
    if how == "interrupted":
        raise KeyboardInterrupt
    return int(how)
rank.main = fake
os.environ["RANK"] = "3"
codes = []
for how in sys.argv[2:]:  # each in a process of its own
    folder = f"{sys.argv[1]}/{how}"
    os.mkdir(folder)
    process = os.fork()
    if not process:
        os.dup2(os.open(f"{folder}/errors", os.O_WRONLY | os.O_CREAT), 2)
        forked.train({"LATER": "yes", "CHANGED": "yes", "RANK": "of another", "OMP_NUM_THREADS": "3"}, ["seed=1"])
        sys.exit()
    codes.append(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))
print(codes)
"""


def test_rank_has_environment_and_exit_of_its_own_process(tmp_path: Path) -> None:
    ends = {"0": 0, "7": 7, "raises": 1, "interrupted": 130}
    variables = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "RANK", "LATER")}
    variables["CHANGED"] = "not yet"
    command = [sys.executable, "-c", PROGRAM, str(tmp_path), *ends]
    done = run_forked(command, PATIENCE, env=variables)
    assert json.loads(done.stdout) == list(ends.values()), done.stderr
    for how in ends:
        assert ("no such thing" in (tmp_path / how / "errors").read_text()) == (how == "raises")
        told = json.loads((tmp_path / how / "told").read_text())
        assert told.pop("changed") == "yes" and told.pop("by the line")
        assert told == {"later": "yes", "rank": "3", "threads": 3, "arguments": ["seed=1"]}
        assert (tmp_path / how / "left").exists()


def test_ranks_are_started_anew_where_they_cannot_be_forked(tmp_path: Path) -> None:
    program = "import sys; from meshloom.launch import agent, forked; forked.can_fork = lambda: False; "
    program += "sys.exit(agent.main(sys.argv[1:]))"
    line = ["--standalone", "--nproc-per-node=1", "-m", "meshloom.launch.rank", "precision=half"]
    done = run_forked([sys.executable, "-c", program, *line], PATIENCE, cwd=tmp_path)
    assert done.returncode == 2 and "there is no 'half'" in done.stderr


def test_ranks_can_be_forked_from_what_only_imports() -> None:
    program = "from meshloom.launch import forked; forked.prepare(); print(forked.can_fork())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True"]


@pytest.mark.parametrize(("change", "code"), [("nothing", 0), ("driver", 1), ("device", 1)])
def test_a_process_that_can_use_no_gpu_says_so(change: str, code: int) -> None:
    def look() -> None:
        from meshloom.launch import preload

        preload.MAY_FORK = change != "driver"
        torch.cuda.device_count = lambda: 1
        torch.cuda.get_device_properties = lambda _: 1 / 0 if change == "device" else None  # type: ignore[assignment]
        forked._try()

    process = multiprocessing.get_context("fork").Process(target=look)
    process.start()
    process.join()
    assert process.exitcode == code


def test_importing_begins_neither_a_gpu_nor_processes() -> None:
    """To ask for a GPU is enough that a process forked afterwards can't use it; on this machine nobody might notice."""
    program = (
        "import sys, psutil, torch; asked = []\n"
        "for name in ('is_available', 'device_count', 'get_device_properties', 'get_device_capability', 'init'):\n"
        "    setattr(torch.cuda, name, lambda *_, name=name: asked.append(name) or 0)\n"
        "from meshloom.launch import preload\n"
        "print(asked, preload.MAY_FORK, psutil.Process().children(), {'meshloom.trainer.run', 'meshloom.data.nodes',"
        " 'meshloom.optim.optimizers.adamw', 'meshloom.trainer.machine_gpus'} <= set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["[]", "True", "[]", "True"]


def test_without_a_driver_nothing_has_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "_driver", lambda: None)
    assert not driver.began() and not driver.shared(0)


def test_the_agent_ends_as_a_program_it_started_ends(tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text("raise SystemExit(6)")
    before = signal.getsignal(signal.SIGUSR1)
    try:
        assert agent.main(["--standalone", "--nproc-per-node=1", str(script)]) == 6
    finally:
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--standalone"],
        ["--nnodes=2", "--node-rank=1", "--master-addr=there", "--max-restarts=2", "--tee=3"],
        ["--nnodes=2", "--rdzv-backend=c10d", "--rdzv-id=7.0", "--rdzv-endpoint=there:20007", "--rdzv-conf=is_host=0"],
    ],
)
def test_but_for_how_ranks_begin_the_agent_is_torchrun(flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[LaunchConfig] = []

    def elastic_launch(config: LaunchConfig, entrypoint: object) -> Callable[..., None]:
        launched.append(config)
        return lambda *_: None

    for place in ("run", "launcher.api"):
        monkeypatch.setattr(f"torch.distributed.{place}.elastic_launch", elastic_launch)
    monkeypatch.setattr("meshloom.launch.forked.prepare", lambda: None)
    monkeypatch.setattr("meshloom.launch.forked.can_fork", lambda: True)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = signal.getsignal(signal.SIGUSR1)
    try:
        for module in ("meshloom.launch.rank", "json.tool"):
            agent.main([*flags, "--nproc-per-node=2", "-m", module])
    finally:
        signal.signal(signal.SIGUSR1, before)
    ours, torchrun = launched
    assert (ours.start_method, torchrun.start_method) == ("forkserver", "spawn")
    for config in launched:
        assert len(config.run_id) == 36 or config.run_id in ("none", "7.0")
    for name in ("min_nodes", "max_nodes", "nproc_per_node", "rdzv_backend", "rdzv_endpoint", "rdzv_configs", "max_restarts"):
        assert getattr(ours, name) == getattr(torchrun, name)


def test_ranks_hung_on_a_dead_peer_get_a_few_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float | None] = []

    def join(self: object, timeout: float | None = None, grace_period: float | None = None) -> bool:
        waited.append(grace_period)
        return True

    def elastic_launch(config: LaunchConfig, entrypoint: object) -> Callable[..., None]:
        return lambda *_: cast(Any, ProcessContext).join(object(), -1)  # as elastic asks after its ranks

    monkeypatch.setattr(ProcessContext, "join", join)
    monkeypatch.setattr("torch.distributed.run.elastic_launch", elastic_launch)
    monkeypatch.setattr("meshloom.launch.forked.prepare", lambda: None)
    monkeypatch.setattr("meshloom.launch.forked.can_fork", lambda: True)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = signal.getsignal(signal.SIGUSR1)
    try:
        assert agent.main(["--standalone", "--nproc-per-node=1", "-m", "meshloom.launch.rank"]) == 0
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert waited == [agent.LAST_WORDS] and ProcessContext.join is join
