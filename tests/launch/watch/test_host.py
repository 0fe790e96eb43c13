"""Watches of two hosts: what one sees reaches the one that judges, and what that decides reaches all."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Generator
from pathlib import Path

import pytest

from meshloom.launch.exit_codes import HUNG
from meshloom.launch.nodes.wire import Server
from meshloom.launch.watch import host
from meshloom.launch.watch.host import HostWatch
from meshloom.launch.watch.news import NewsLink, NewsStore
from meshloom.launch.watch.stacks import Stack
from meshloom.parallel.heartbeat import Heartbeat
from meshloom.trainer.watch.folder import AttemptFolder, write_json
from meshloom.trainer.watch.incidents import read_incidents

PATIENCE = 60.0  # seconds: two, as a rule
SILENT = 100.0  # seconds of silence: more than any rank is given that is stopped


@pytest.fixture
def store() -> Generator[NewsStore]:
    found = NewsStore()
    yield found
    found.close()


class Hosts:
    """Two hosts of one rank each, whose first judges. A rank is a process that sleeps, and its heartbeat one of its name."""

    def __init__(self, folder: Path, store: NewsStore) -> None:
        self.folder = folder
        self.ranks = [subprocess.Popen(["sleep", "600"]) for _ in range(2)]
        self.watches = [HostWatch(folder / f"host-{node}", store if node == 0 else None) for node in range(2)]
        about = {"output_dir": str(folder / "run"), "silence": "auto", "timeout": 600.0, "save_timeout": 600.0, "nodes": 2}
        about |= {"launch": "here", "world_size": 2, "address": f"127.0.0.1:{store.port}"}
        for node, rank in enumerate(self.ranks):
            attempt = AttemptFolder.of(folder / f"host-{node}", 0)
            attempt.path.mkdir(parents=True)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(os, "getpid", lambda rank=rank: rank.pid)
                Heartbeat(attempt.beat(node)).begin_step(7)
            write_json(attempt.run, {**about, "node": node})

    def close(self) -> None:
        for watch in self.watches:
            if watch.is_alive():
                watch.stop()
        for rank in self.ranks:
            rank.kill()
            rank.wait()


@pytest.fixture
def hosts(tmp_path: Path, store: NewsStore, monkeypatch: pytest.MonkeyPatch) -> Generator[Hosts]:
    with monkeypatch.context() as patch:
        patch.setattr(time, "monotonic", lambda now=time.monotonic: now() - SILENT)
        found = Hosts(tmp_path, store)
    yield found
    found.close()


def wait(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_news_are_kept_and_asked_for_over_one_connection(store: NewsStore) -> None:
    link = NewsLink("127.0.0.1", store.port)
    assert link.get("a") is None
    link.set("a", "1")
    store.set("b", "2")
    assert (store.get("a"), link.get("a"), link.get("b")) == ("1", "1", "2")
    store.close()
    with pytest.raises(OSError, match="closed"):
        link.get("a")
    link.close()


def test_another_program_at_its_port_is_no_store_of_news() -> None:
    other = Server(lambda _: {"order": "wait"}, lambda _: None)
    link = NewsLink("127.0.0.1", other.port)
    with pytest.raises(OSError, match="another program"):
        link.set("a", "1")
    link.close()
    other.close()


def test_all_hosts_end_their_ranks_when_one_is_ended_for_a_hang(hosts: Hosts) -> None:
    os.kill(hosts.ranks[1].pid, signal.SIGSTOP)
    for watch in hosts.watches:
        watch.start()
    assert [rank.wait(PATIENCE) for rank in hosts.ranks] == [-signal.SIGKILL] * 2
    wait(lambda: all(watch.ended is not None for watch in hosts.watches))
    for watch in hosts.watches:
        assert watch.ended is not None and (watch.ended.rank, watch.ended.code) == (1, HUNG)
    (incident,) = read_incidents(hosts.folder / "run")
    assert incident["kind"] == "hang" and "rank 1" in incident["message"]
    assert "is stopped (SIGSTOP)" in incident["message"] and "0" in incident["details"]["waiting"]


def test_ranks_end_once_other_hosts_have_heard(hosts: Hosts, store: NewsStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Host 1 reads the first of two stacks while the run is ended. Host 0 keeps its rank and its store until it has heard."""
    with monkeypatch.context() as patch:
        patch.setattr(time, "monotonic", lambda now=time.monotonic: now() - SILENT)
        patch.setattr(os, "getpid", lambda: hosts.ranks[1].pid)
        Heartbeat(AttemptFolder.of(hosts.folder / "host-1", 0).beat(2)).begin_step(7)
    take, kept, reads = host.take_stack, list[bool](), threading.Event()

    def slow(pid: int, file: Path, *, stopped: bool) -> Stack | None:
        if threading.current_thread() is hosts.watches[1]:
            reads.set()
            wait(lambda: store.get("here/attempt-0/ended"))
            time.sleep(4 * host.POLL_SECONDS)
            kept.append(hosts.ranks[0].poll() is None)
        return take(pid, file, stopped=stopped)

    monkeypatch.setattr(host, "take_stack", slow)
    monkeypatch.setattr(host, "TOLD_SECONDS", PATIENCE)
    os.kill(hosts.ranks[1].pid, signal.SIGSTOP)
    hosts.watches[1].start()
    assert reads.wait(PATIENCE)
    hosts.watches[0].start()
    assert [rank.wait(PATIENCE) for rank in hosts.ranks] == [-signal.SIGKILL] * 2
    assert kept == [True], "and it reads no second one"


def test_a_host_says_that_the_one_that_judges_does_not_answer(
    hosts: Hosts, store: NewsStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(host, "LOST_SECONDS", 0.2)
    hosts.watches[1].start()
    wait(lambda: store.get("here/attempt-0/node-1"))
    time.sleep(2 * host.POLL_SECONDS)
    store.close()
    said: list[str] = []
    wait(lambda: said.append(capsys.readouterr().err) or "rank 0's host does not answer" in "".join(said))
