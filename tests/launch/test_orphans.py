"""Ranks end with their agent, whatever it or they were doing: one that is stopped, too, for it would hold its GPU."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

PATIENCE = 120.0
AGENT = """
import multiprocessing, os, sys, time
from pathlib import Path
from meshloom.launch import forked

def rank(folder, seconds, looks):
    forked.LOOK_SECONDS, forked.STOPPED_SECONDS = looks, 4 * looks
    forked.end_with_agent(seconds)
    Path(folder, "new").write_text(f"{os.getpid()} {os.getppid()}")
    Path(folder, "new").rename(Path(folder, "pids"))
    time.sleep(600)

def main(folder, seconds, looks):
    forked.PRELOADED = forked.PRELOADED[:1]  # without the imports of a real rank, which take seconds
    forked.prepare()
    multiprocessing.get_context(forked.METHOD).Process(target=rank, args=(folder, float(seconds), float(looks))).start()
    time.sleep(600)
"""


def _runs(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@dataclass(frozen=True)
class Started:
    """An agent, its fork server and one rank."""

    agent: subprocess.Popen[bytes]
    server: psutil.Process
    rank: psutil.Process


@pytest.fixture
def start(tmp_path: Path) -> Generator[Callable[..., Started]]:
    (tmp_path / "agents.py").write_text(AGENT)
    variables = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}", "RANK": "3"}
    made: list[subprocess.Popen[bytes]] = []

    def started(seconds: float, looks: float = 1.0) -> Started:
        words = [str(tmp_path), str(seconds), str(looks)]
        command = [sys.executable, "-c", "import sys, agents; agents.main(*sys.argv[1:])", *words]
        made.append(subprocess.Popen(command, env=variables, start_new_session=True, stderr=subprocess.PIPE))
        deadline = time.monotonic() + PATIENCE
        while not (tmp_path / "pids").exists():
            assert made[-1].poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        rank, server = (psutil.Process(int(pid)) for pid in (tmp_path / "pids").read_text().split())
        return Started(made[-1], server, rank)

    yield started
    for agent in made:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(agent.pid, signal.SIGKILL)
        agent.communicate()


@pytest.mark.parametrize("seconds", [0.0, 0.5])
@pytest.mark.parametrize("stopped", ["neither", "rank", "both"])
def test_a_rank_ends_with_its_agent(seconds: float, stopped: str, start: Callable[..., Started]) -> None:
    here = start(seconds)
    if stopped != "neither":
        here.rank.suspend()
    if stopped == "both":
        here.server.suspend()
    here.agent.kill()
    wait_for_the_end(here.rank, here.server)


def test_a_rank_ends_if_its_agent_stays_stopped(start: Callable[..., Started]) -> None:
    here = start(0.0, looks=0.05)
    here.agent.send_signal(signal.SIGSTOP)
    wait_for_the_end(here.rank)
    here.agent.kill()
    assert here.agent.stderr is not None
    assert f"rank 3 ends: its agent (pid {here.agent.pid}) is stopped".encode() in here.agent.stderr.read()


RANK = """
import os, time
from meshloom.launch import forked
forked.LOOK_SECONDS, forked.STOPPED_SECONDS = 0.05, 0.2
forked.end_with_parent()
print(os.getpid(), flush=True)
time.sleep(600)
"""


def test_a_rank_that_is_not_forked_ends_if_its_agent_stays_stopped() -> None:
    words = [sys.executable, "-c", "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])", RANK]
    agent = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    assert agent.stdout is not None
    rank = psutil.Process(int(agent.stdout.readline()))
    try:
        agent.send_signal(signal.SIGSTOP)
        wait_for_the_end(rank)
    finally:
        os.killpg(agent.pid, signal.SIGKILL)
        told = agent.communicate()[1]
    assert f"its agent (pid {agent.pid}) is stopped".encode() in told


LAUNCHER = """
import subprocess, sys, time
agent = '''
import os, time
from meshloom.launch.parent import when_launcher_dies
when_launcher_dies(lambda: os._exit(0))
print(os.getpid(), flush=True)
time.sleep(600)
'''
subprocess.Popen([sys.executable, "-c", agent], start_new_session=True)
time.sleep(600)
"""


def test_a_stopped_agent_hears_of_its_launcher_s_end() -> None:
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCHER], stdout=subprocess.PIPE, start_new_session=True)
    assert launcher.stdout is not None
    agent = psutil.Process(int(launcher.stdout.readline()))
    try:
        agent.suspend()
        launcher.kill()
        wait_for_the_end(agent)
    finally:
        launcher.kill()
        with contextlib.suppress(psutil.Error):
            agent.kill()
        launcher.communicate()


def wait_for_the_end(*processes: psutil.Process) -> None:
    deadline = time.monotonic() + PATIENCE
    while any(_runs(each) for each in processes):
        assert time.monotonic() < deadline
        time.sleep(0.01)
