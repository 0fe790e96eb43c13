"""Machines that can't reach one another while all see the run's folder: nobody takes the place of a leader that lives."""

from __future__ import annotations

import errno
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Generator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from meshloom.launch.nodes import agent, leader
from meshloom.launch.nodes.admission import credentials
from meshloom.launch.nodes.agent import Machine
from meshloom.launch.nodes.announcer import Announcer
from meshloom.launch.nodes.leader import Order, State
from meshloom.launch.nodes.leading import Leading
from meshloom.launch.nodes.lease import LeaseWatch
from meshloom.launch.nodes.memory import Assignment, Memory, NodeRanks
from meshloom.launch.nodes.part import Part, Rules
from meshloom.launch.nodes.terms import Term, Terms, meeting_folder
from meshloom.launch.nodes.wire import Link
from meshloom.trainer.watch.incidents import IncidentLog

OPEN = Path("/proc/self/fd")


NAMES = [f"{socket.gethostname()}-{letter}-0" for letter in "abc"]


class FakeRanks:
    """A rank that runs until it is ended, or asked to save. stuck: it is not gone when it was killed."""

    stuck = False

    def __init__(self, *_: object) -> None:
        self.code: int | None = None

    def codes(self) -> dict[int, int | None]:
        return {0: self.code}

    def kill(self) -> None:
        self.code = -9

    def left(self) -> dict[int, int]:
        return {0: 7} if self.stuck or self.code is None else {}

    def ask_to_save(self) -> None:
        self.code = 0


class Cluster:
    """Machines of one process, each with an address of its own, between which the network can be cut."""

    def __init__(self, folder: Path, least: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.asking = folder, ""
        self.cut: set[str] = set()
        placements = {number: [] for number in range(least, 4)}
        part = Part(str(folder), Rules(1, 3, placements, 3, 0.0), [], "127.0.0.1")
        self.terms = Terms(meeting_folder(folder))
        monkeypatch.setattr(agent, "Link", self._connect)
        monkeypatch.setattr(agent, "LocalRanks", FakeRanks)
        supervisor = SimpleNamespace(root=folder, end_attempt=lambda _: None)
        self.machines: dict[str, Machine] = {}
        for number, name in enumerate(NAMES, 1):
            self.machines[name] = Machine(Part(**{**vars(part), "address": f"127.0.0.{number}"}), cast(Any, supervisor))
            self.machines[name]._id = name

    def _connect(self, host: str, port: int) -> Link:
        there = NAMES[int(host[-1]) - 1]
        if (there in self.cut) != (self.asking in self.cut):
            raise OSError(errno.EHOSTUNREACH, "No route to host")
        return Link(host, port)

    def part(self, *names: str) -> None:
        """Cut the network between these machines and the others."""
        self.cut = set(names)
        for name, machine in self.machines.items():
            newest = self.terms.newest()
            if newest is not None and machine._link is not None and (name in self.cut) != (newest.id in self.cut):
                machine._link.close()
                machine._link = None

    def wait(self, condition: Callable[[], bool], seconds: float = 20.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.shown()
            self.pass_time(0.05)

    def pass_time(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            for name, machine in self.machines.items():
                self.asking = name
                machine.turn()
            time.sleep(0.02)

    def shown(self) -> dict[str, Any]:
        return {name: (each._attempt, str(each._state)) for name, each in self.machines.items()}

    def number(self, name: str) -> int:
        """Return the number of the newest attempt that a machine knows of."""
        return self.machines[name]._memory.number

    def running(self) -> set[str]:
        return {name for name, each in self.machines.items() if each._state is State.RUNNING}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short times, each long enough for a machine that shares a core."""
    for name, seconds in {"LEASE_SECONDS": 2.0, "REFUSED_SECONDS": 2.0, "YIELD_SECONDS": 0.5, "ANSWER_SECONDS": 2.0}.items():
        monkeypatch.setattr(agent, name, seconds)
    monkeypatch.setattr(leader, "SETTLE_SECONDS", 0.2)


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None) -> Generator[Callable[[int], Cluster]]:
    made: list[Cluster] = []

    def make(least: int) -> Cluster:
        made.append(Cluster(tmp_path, least, monkeypatch))
        made[0].wait(lambda: len(made[0].running()) == 3)
        return made[0]

    yield make
    for machine in made[0].machines.values():
        machine.close()


def test_a_leader_that_is_cut_off_and_has_enough_machines_stays(cluster: Callable[[int], Cluster]) -> None:
    three = cluster(1)
    first = three.terms.newest()
    assert first is not None
    before = three.number(first.id)
    three.part(first.id)
    three.wait(lambda: three.running() == {first.id})  # the others have ended their ranks, and wait
    three.pass_time(1.0)
    assert three.terms.newest() == first and three.number(first.id) == before + 1
    three.part()
    three.wait(lambda: len(three.running()) == 3)
    assert three.terms.newest() == first and not three.terms.apart(first.number)


def test_a_leader_with_too_few_machines_lets_others_lead(
    cluster: Callable[[int], Cluster], capsys: pytest.CaptureFixture[str]
) -> None:
    three = cluster(2)
    first = three.terms.newest()
    assert first is not None
    three.part(first.id)
    others, before = set(three.machines) - {first.id}, three.number(first.id)
    three.wait(lambda: three.running() == others and three.number(min(others)) > before)
    newest = three.terms.newest()
    assert newest is not None and newest.number == 2 and newest.id in others
    three.pass_time(1.0)
    assert three.terms.newest() == newest and three.running() == others
    assert f"can't be reached at {first.host}:{first.port}" in capsys.readouterr().err


def test_a_machine_that_can_t_reach_the_leader_does_not_take_its_place(
    cluster: Callable[[int], Cluster], monkeypatch: pytest.MonkeyPatch
) -> None:
    three = cluster(2)
    first = three.terms.newest()
    assert first is not None
    late = next(name for name in three.machines if name != first.id)
    three.part(late)
    three.wait(lambda: three.running() == set(three.machines) - {late})
    assert three.terms.newest() == first and three.terms.apart(1) == [socket.gethostname()]


def test_a_full_disk_stops_a_claim_once_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    supervisor = SimpleNamespace(root=tmp_path, end_attempt=lambda _: None)
    machine = Machine(Part(str(tmp_path), Rules(1, 2, {1: []}, 3, 0.0), [], "127.0.0.1"), cast(Any, supervisor))

    def full(*_: object) -> bool:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Terms, "claim", full)
    monkeypatch.setattr(agent, "RETRY_SECONDS", 0.0)
    before = len(list(OPEN.iterdir()))
    for _ in range(3):
        machine.turn()
    assert len(list(OPEN.iterdir())) <= before and "leader" not in {each.name for each in threading.enumerate()}
    assert capsys.readouterr().err.count("No space left on device") == 1
    monkeypatch.setattr(agent, "APART_SECONDS", 0.0)
    assert machine.run() == 78
    machine.close()


def test_ranks_that_are_not_gone_hold_their_machine_back(
    cluster: Callable[[int], Cluster], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    three = cluster(2)
    first = three.terms.newest()
    assert first is not None
    monkeypatch.setattr(agent, "KILL_SECONDS", 0.2)
    held = next(name for name in three.machines if name != first.id)
    ranks, before = cast(FakeRanks, three.machines[held]._ranks), three.number(held)
    ranks.stuck = True
    three.part(next(name for name in three.machines if name not in (first.id, held)))
    three.wait(lambda: three.machines[held]._state is State.ENDING)
    three.pass_time(0.4)
    assert three.machines[held]._ranks is ranks and three.number(held) == before, "no rank is started beside one that lives"
    assert "rank 0 (pid 7) of attempt" in capsys.readouterr().err
    ranks.stuck = False
    three.wait(lambda: three.number(held) > before and three.machines[held]._state is State.RUNNING)
    assert three.machines[held]._ranks is not ranks


def test_a_slow_disk_does_not_stall_the_machines(cluster: Callable[[int], Cluster], monkeypatch: pytest.MonkeyPatch) -> None:
    three = cluster(2)
    first = three.terms.newest()
    assert first is not None
    released = threading.Event()

    def write(log: IncidentLog, incident: object) -> None:
        released.wait(60.0)
        written.append(incident)

    def look(*_: object) -> bool:
        released.wait(60.0)
        return False

    written: list[object] = []
    monkeypatch.setattr(IncidentLog, "write", write)
    before = three.number(first.id)
    three.part(next(name for name in three.machines if name != first.id))
    three.wait(lambda: three.number(first.id) > before and len(three.running()) == 2)
    assert not written, "the loss of a machine was told meanwhile"
    monkeypatch.setattr(Terms, "renew", look)
    monkeypatch.setattr(Terms, "is_over", look)
    three.pass_time(0.4)
    assert len(three.running()) == 2 and three.terms.newest() == first
    released.set()
    three.wait(lambda: bool(written))


def test_an_agent_of_another_run_is_told_so_and_goes_on_looking(
    cluster: Callable[[int], Cluster], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    three = cluster(2)
    newest = three.terms.newest()
    assert newest is not None
    other = Terms(three.folder / "other" / ".nodes" / "by-hand")
    other.claim(Term(1, f"{socket.gethostname()}-x-0", newest.host, newest.port))  # whose port this run's leader has by now
    part = Part(str(three.folder / "other"), Rules(1, 3, {1: []}, 3, 0.0), [], "127.0.0.1")
    stray = Machine(part, cast(Any, SimpleNamespace(root=three.folder, end_attempt=lambda _: None)))
    three.asking = newest.id
    stray.turn()
    assert stray._term is not None and stray._outcome is None and stray._link is None
    assert f"is not the leader of this run any more: its machine leads term 1 of {newest.run}" in capsys.readouterr().err
    three.pass_time(0.3)
    assert len(three.running()) == 3
    stray.close()


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n", b'{"id": "machine"}\n'])
def test_another_program_at_a_dead_leader_s_port_is_no_leader(quick: None, tmp_path: Path, answer: bytes) -> None:
    class Other(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(10)
            self.request.sendall(answer)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Other) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        terms = Terms(meeting_folder(tmp_path))
        terms.claim(Term(1, f"{socket.gethostname()}-x-0", "127.0.0.1", server.server_address[1]))
        terms.renew(1, 7)
        part = Part(str(tmp_path), Rules(1, 2, {1: []}, 3, 0.0), [], "127.0.0.1")
        machine = Machine(part, cast(Any, SimpleNamespace(root=tmp_path, end_attempt=lambda _: None)))
        deadline = time.monotonic() + 30.0
        while machine._own is None:
            assert time.monotonic() < deadline
            time.sleep(machine.turn())
        machine.close()
        server.shutdown()


def test_a_machine_that_was_suspended_waits_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.monotonic()
    monkeypatch.setattr(agent.time, "monotonic", lambda: now)
    terms = Terms(meeting_folder(tmp_path))
    part = Part(str(tmp_path), Rules(1, 2, {1: []}, 3, 0.0), [], "127.0.0.1")
    machine = Machine(part, cast(Any, SimpleNamespace(root=tmp_path, end_attempt=lambda _: None)))
    monkeypatch.setattr(Machine, "_ask", lambda _: None)
    now += 2 * agent.APART_SECONDS
    assert machine.turn() > 0 and machine._outcome is None
    for _ in range(int(agent.APART_SECONDS / 10) + 1):
        now += 10.0
        machine.turn()
    assert machine._outcome == 78 and not list(terms.folder.glob("refused-*"))
    machine.close()


def test_a_leader_answers_once_it_knows_what_it_leads(tmp_path: Path) -> None:
    """Others find its term as soon as it is claimed; a rank that runs must not be ended for that."""
    node = NodeRanks("b", "node-b", 0, 1)
    memory = Memory("launch-1", Assignment(3, [node], "10.0.0.2", 5, (), 1))
    part = Part(str(tmp_path), Rules(1, 3, {1: []}, 3, 0.0), [], "10.0.0.1")
    terms, announcer = Terms(tmp_path), Announcer()
    own = Leading(part, memory, announcer, IncidentLog(tmp_path), terms)
    term = Term(2, "spare-1-0", "10.0.0.1", own.port)
    about: dict[str, Any] = {
        "id": "b",
        "host": "node-b",
        "address": "10.0.0.2",
        "port": 6,
        "state": State.RUNNING,
        "attempt": 3,
    }
    about |= {"report": None, "leaving": False, "knows": memory.digest, "memory": None, "common": None, **credentials(term)}
    answers: list[dict[str, Any]] = []
    asking = threading.Thread(target=lambda: answers.append(Link("127.0.0.1", own.port).ask(about, "order")), daemon=True)
    asking.start()
    asking.join(0.2)
    assert not answers
    assert terms.claim(term)
    own.begin(term, "gone-1-0")
    asking.join(30.0)
    assert [each["order"] for each in answers] == [Order.RUN]
    own.close()
    announcer.close()


def test_a_lease_moves_until_it_is_given_up(tmp_path: Path) -> None:
    terms, watch = Terms(tmp_path), LeaseWatch()
    terms.claim(Term(1, "a", "10.0.0.1", 5))
    assert watch.still(1, terms.lease(1), 10.0) == 0.0 and not watch.moves
    assert watch.still(1, terms.lease(1), 13.0) == 3.0
    terms.renew(1, 1)
    assert watch.still(1, terms.lease(1), 14.0) == 0.0 and watch.moves
    terms.release(1)
    assert watch.still(1, terms.lease(1), 14.0) == float("inf") and not watch.moves
    assert not terms.is_over(1)
    newest = Term(2, "b", "10.0.0.2", 5)
    terms.claim(newest)
    assert terms.is_over(1) and not terms.is_over(2)
    terms.end(newest, 0)
    assert terms.is_over(2) and [path.name for path in tmp_path.iterdir()] == ["outcome"]
