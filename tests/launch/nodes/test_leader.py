"""The decisions of the leader: who takes part, what is lost, what costs a restart. No process is started."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from meshloom.launch.exit_codes import BAD_CONFIG, NO_PROGRESS, TOO_FEW_MACHINES
from meshloom.launch.nodes.leader import (
    ENDING_SECONDS,
    GATHER_SECONDS,
    PORTS,
    SETTLE_SECONDS,
    SURVIVOR_SECONDS,
    Leader,
    Order,
    State,
)
from meshloom.launch.nodes.memory import Memory
from meshloom.launch.nodes.part import FLAG, Part, Rules, overlaid
from meshloom.launch.nodes.terms import Term, Terms
from meshloom.launch.nodes.wire import ANSWER_SECONDS, Link, Message, Server
from meshloom.launch.watch.failures import Failure, Report
from meshloom.trainer.watch.rank import PORT_IS_TAKEN

RULES = Rules(processes=2, most=4, placements={2: ["parallel.pp=2"], 3: [], 4: []}, max_restarts=3, join_seconds=30.0)


class Cluster:
    """Machines that do at once what the leader says, under a clock of their own."""

    def __init__(self, rules: Rules = RULES, memory: Memory | None = None) -> None:
        self.told: list[str] = []
        self.judged: list[bool] = []
        self.leader = self._leader(rules, memory or Memory())
        self.now = 0.0
        self.machines: dict[str, Message] = {}
        self.answers: dict[str, Message] = {}

    def _leader(self, rules: Rules, memory: Memory) -> Leader:
        return Leader(
            rules,
            lambda _, text: self.told.append(text),
            lambda *judged: self.judged.append(judged[2].again),
            memory,
            leads=lambda: True,
        )

    def add(self, *names: str, **more: Any) -> None:
        """Add machines, which wait."""
        for name in names:
            about = {"id": name, "host": f"node-{name}", "address": "10.0.0.1", "port": 1, "attempt": -1}
            about |= {"state": State.WAITING, "report": None, "leaving": False, "knows": "", "memory": None}
            self.machines[name] = {**about, **more}

    def pass_time(self, seconds: float) -> None:
        """Let all machines ask every second."""
        for _ in range(max(1, round(seconds))):
            self.now += 1.0
            for name, about in list(self.machines.items()):
                answer = self.leader.hear(about, self.now)
                self.answers[name] = answer
                if answer["order"] in (Order.END, Order.REFUSE):
                    del self.machines[name]
                elif answer["order"] == Order.WAIT:
                    about["state"] = State.ENDING if about.get("stuck") else State.WAITING
                elif about["attempt"] != self.leader.memory.number:
                    about |= {"state": State.RUNNING, "attempt": self.leader.memory.number, "report": None}
                elif answer["order"] == Order.BORDER:
                    about["state"] = State.DONE

    def kill(self, name: str) -> None:
        """End a machine, and its connection with it."""
        del self.machines[name]
        self.leader.lost(name, self.now)

    def fail(self, name: str, code: int = -9, *, peer: bool = False, error: str = "", last: int = 7) -> None:
        """Let the first rank of a machine fail."""
        rank = next(node.first_rank for node in self.nodes if node.id == name)
        failure = Failure(rank, code, "backward", 1, "backward", error, "", peer, 1.0, f"node-{name}")
        self.machines[name] |= {"state": State.FAILED, "report": Report((failure,), 1, last).as_dict()}

    @property
    def nodes(self) -> Sequence[Any]:
        assert self.leader.memory.assignment is not None
        return self.leader.memory.assignment.nodes

    @property
    def ids(self) -> list[str]:
        return [node.id for node in self.nodes]


def started(*names: str) -> Cluster:
    cluster = Cluster()
    cluster.add(*names)
    cluster.pass_time(40)
    assert cluster.ids == list(names)
    return cluster


def test_a_run_waits_for_the_most_and_begins_with_the_least() -> None:
    cluster = Cluster()
    cluster.add("a", "b")
    cluster.pass_time(20)
    assert cluster.leader.memory.assignment is None
    cluster.pass_time(20)
    assert cluster.ids == ["a", "b"] and [node.first_rank for node in cluster.nodes] == [0, 2]
    assert cluster.leader.memory.assignment is not None and cluster.leader.memory.assignment.words == ["parallel.pp=2"]
    at_once = Cluster()
    at_once.add(*"abcd")
    at_once.pass_time(2)
    assert at_once.ids == list("abcd")


def test_a_lost_machine_costs_no_restart_and_the_others_go_on() -> None:
    cluster = started(*"abc")
    for peer in "bc":
        cluster.fail(peer, 1, peer=True)  # what ranks say of a lost peer comes before the silence
    cluster.kill("a")
    cluster.pass_time(3)
    assert cluster.ids == ["b", "c"] and not cluster.leader.memory.failures and cluster.judged == []
    assert any("node-a (ranks 0 to 1) is lost" in text for text in cluster.told)
    cluster.machines["b"]["heard"] = 0
    silent = cluster.machines.pop("b")  # its host died: nothing closes the connection
    cluster.add("d")
    cluster.pass_time(ANSWER_SECONDS + 3)
    assert cluster.ids == ["c", "d"], "the machine that was here before keeps the first ranks"
    cluster.machines["b"] = silent  # it was only frozen: it joins as a further one
    cluster.pass_time(SETTLE_SECONDS + 4)
    assert cluster.ids == ["c", "d", "b"]


def test_a_machine_joins_after_the_ranks_have_saved() -> None:
    cluster = started("a", "b")
    cluster.add("c")
    cluster.pass_time(1)
    assert cluster.answers["a"]["order"] == Order.RUN
    cluster.pass_time(SETTLE_SECONDS)
    assert cluster.answers["a"]["order"] == Order.BORDER and cluster.answers["c"]["order"] == Order.WAIT
    cluster.pass_time(3)
    assert cluster.ids == ["a", "b", "c"] and cluster.leader.memory.number == 1 and cluster.judged == []


def test_a_machine_that_leaves_lets_the_ranks_save() -> None:
    cluster = started(*"abc")
    cluster.machines["b"]["leaving"] = True
    cluster.pass_time(1)
    assert cluster.answers["c"]["order"] == Order.BORDER, "which asked after b"
    cluster.pass_time(3)
    assert cluster.ids == ["a", "c"]


def test_failures_are_counted_once_for_all_machines() -> None:
    cluster = started("a", "b")
    for number in range(4):
        cluster.fail("a", 1, peer=True, last=7 + number)
        cluster.fail("b", last=7 + number)
        cluster.pass_time(4)
    assert cluster.judged == [True, True, True, False]
    assert cluster.leader.ended == 137 and cluster.answers["a"]["code"] == 137


def test_a_config_error_is_not_tried_again() -> None:
    cluster = started("a", "b")
    cluster.fail("b", BAD_CONFIG)
    cluster.pass_time(SETTLE_SECONDS + 2)
    assert cluster.leader.ended == BAD_CONFIG and cluster.judged == [False]
    assert "a config error is not tried again" in cluster.answers["a"]["said"], "its own ranks know nothing of it"


def test_the_machine_that_always_dies_first_is_left_out() -> None:
    cluster = started(*"abc")
    for _ in range(3):
        cluster.fail("b")
        cluster.pass_time(SETTLE_SECONDS + 3)
    assert cluster.ids == ["a", "c"] and cluster.answers["b"] == {
        "order": Order.REFUSE, "code": NO_PROGRESS, "said": "the run goes on without this machine",
    }  # fmt: skip
    assert not cluster.leader.memory.failures
    for _ in range(3):  # too few are left to leave out another
        cluster.fail("c")
        cluster.pass_time(SETTLE_SECONDS + 3)
    assert cluster.leader.ended == NO_PROGRESS


def test_all_ranks_at_the_end_end_the_run() -> None:
    cluster = started("a", "b")
    cluster.machines["a"]["state"] = State.DONE
    cluster.pass_time(1)
    assert cluster.leader.ended is None
    cluster.machines["b"]["state"] = State.DONE
    cluster.pass_time(2)
    assert cluster.leader.ended == 0 and cluster.leader.told and cluster.answers["a"]["said"] == ""


def test_a_survivor_takes_over_with_what_it_knows() -> None:
    cluster = started(*"abc")
    known = Memory.from_dict(cluster.leader.memory.as_dict())
    assert known.digest == cluster.leader.memory.digest
    after = Cluster(memory=known)
    after.leader.take_over("a")
    after.add("b", "c", attempt=0, state=State.RUNNING)
    after.pass_time(4)
    assert after.ids == ["b", "c"] and after.leader.memory.number == 1
    assert after.leader.memory.launch == known.launch, "so the ranks go on with their run"


def test_a_new_leader_learns_from_machines_that_were_here() -> None:
    known = started(*"abc").leader.memory
    late = Cluster()
    late.add("d")
    late.add("b", "c", attempt=0, state=State.RUNNING, memory=replace(known, failures=[]).as_dict())
    late.pass_time(SETTLE_SECONDS + 4)
    assert late.leader.memory.launch == known.launch and late.leader.memory.number == 1


@pytest.mark.parametrize("known_at_first", [True, False])
def test_an_attempt_outlives_a_leader_without_ranks(known_at_first: bool) -> None:
    memory = started("a", "b").leader.memory
    after = Cluster(memory=memory if known_at_first else None)
    if known_at_first:
        after.leader.take_over("spare")
    after.add("b", attempt=0, state=State.RUNNING, memory=memory.as_dict())
    after.pass_time(1)
    after.add("a", attempt=0, state=State.RUNNING, memory=memory.as_dict())
    assert after.answers["b"]["order"] == Order.RUN, "so that it does not end its ranks meanwhile"
    after.pass_time(SETTLE_SECONDS + 3)
    assert after.leader.memory.number == 0 and after.leader.busy and after.told == []
    assert {each["order"] for each in after.answers.values()} == {Order.RUN}


def test_an_attempt_that_a_machine_has_left_is_not_adopted() -> None:
    after = Cluster(memory=started("a", "b").leader.memory)
    after.leader.take_over("spare")
    after.add("a", attempt=0, state=State.RUNNING)
    after.add("b", attempt=0)
    after.pass_time(4)
    assert after.leader.memory.number == 1 and after.ids == ["a", "b"]


def test_a_machine_that_does_not_fit_is_the_reason_of_too_few() -> None:
    cluster = Cluster()
    cluster.add("a")
    for _ in range(2):
        assert cluster.leader.refuse("node-b has launch.nproc=8")["order"] == Order.REFUSE
    cluster.leader.missing = ["node-c does not take part: data: no such file"]
    cluster.pass_time(GATHER_SECONDS + 3)
    assert cluster.leader.ended == BAD_CONFIG and cluster.told.count("node-b has launch.nproc=8") == 1
    assert "; node-b has launch.nproc=8; node-c does not take part: data: no such file" in cluster.told[-1]
    assert cluster.answers["a"]["said"] == cluster.told[-1]


def test_too_few_machines_end_the_run_after_a_while() -> None:
    cluster = started("a", "b")
    cluster.kill("b")
    cluster.pass_time(GATHER_SECONDS + 3)
    assert cluster.leader.ended == TOO_FEW_MACHINES and "waiting for machines: 1 of at least 2 are here" in cluster.told


def test_a_run_that_had_begun_does_not_end_as_a_config_error() -> None:
    cluster = started("a", "b")
    cluster.kill("b")
    cluster.leader.missing = ["node-c does not take part: data: no such file"]
    cluster.pass_time(GATHER_SECONDS + 3)
    assert cluster.leader.ended == TOO_FEW_MACHINES and "node-c does not take part" in cluster.told[-1]


def test_a_leader_that_was_suspended_takes_nobody_for_lost() -> None:
    cluster = started("a", "b")
    cluster.now += 60.0
    cluster.pass_time(3)
    assert cluster.leader.memory.number == 0 and not any("lost" in text for text in cluster.told)
    cluster.kill("b")
    cluster.pass_time(5)
    cluster.now += 2 * GATHER_SECONDS
    cluster.pass_time(3)
    assert cluster.leader.ended is None, "nobody could come meanwhile"


def test_a_machine_that_has_ended_its_ranks_is_not_waited_for() -> None:
    cluster = started("a", "b")
    cluster.machines["b"]["state"] = State.WAITING  # it was cut off for a while, and then reached the same leader
    cluster.pass_time(3)
    assert cluster.ids == ["a", "b"] and cluster.leader.memory.number == 1 and not cluster.judged
    assert "node-b was cut off and has ended its ranks: the run goes on from what is saved" in cluster.told


def test_ranks_that_die_slowly_are_waited_for() -> None:
    cluster = started(*"abcd")
    cluster.kill("a")
    cluster.machines["b"]["stuck"] = True
    cluster.pass_time(SURVIVOR_SECONDS + 5)
    assert cluster.leader.memory.number == 0, "it says that it ends its ranks"
    cluster.machines["b"]["stuck"] = False
    cluster.pass_time(2)
    assert cluster.ids == list("bcd") and cluster.leader.memory.number == 1
    cluster.kill("d")
    cluster.machines["b"]["stuck"] = True
    cluster.add("e")
    cluster.pass_time(ENDING_SECONDS + 3)
    assert cluster.ids == ["c", "e"], "but not for ever, where the others are enough"


def test_ranks_meet_at_another_port_where_theirs_was_taken() -> None:
    cluster = started("a", "b")
    taken = f"DistNetworkError: port: 1, code: -98, name: EADDRINUSE, message: a{PORT_IS_TAKEN}"
    for number in range(PORTS):
        cluster.fail("a", 1, error=taken, last=0)
        cluster.pass_time(SETTLE_SECONDS + 3)
        assert cluster.leader.memory.number == number + 1 and not cluster.judged
    assert "port 1 of 10.0.0.1 was taken meanwhile: the ranks meet at another" in cluster.told
    cluster.fail("a", 1, error=taken, last=0)
    cluster.pass_time(SETTLE_SECONDS + 3)
    assert len(cluster.judged) == 1


def test_another_port_that_is_taken_is_a_failure() -> None:
    cluster = started("a", "b")
    cluster.fail("a", 1, error=f"the port: 16001 of the metrics: A{PORT_IS_TAKEN}", last=0)
    cluster.pass_time(SETTLE_SECONDS + 3)
    assert len(cluster.judged) == 1


def test_a_leader_whose_lease_is_over_begins_nothing() -> None:
    cluster = Cluster()
    cluster.leader.leads = lambda: False
    cluster.add(*"abcd")
    cluster.pass_time(40)
    assert cluster.leader.memory.assignment is None
    cluster.machines.clear()
    cluster.pass_time(GATHER_SECONDS + 3)
    assert cluster.leader.ended is None, "another may lead, and have enough"
    cluster.add(*"abcd")
    cluster.leader.leads, cluster.leader.term = lambda: True, 7
    cluster.pass_time(1)
    assert cluster.leader.memory.assignment is not None and cluster.leader.memory.assignment.term == 7


def test_the_first_to_claim_a_term_leads_it(tmp_path: Path) -> None:
    here, there = Terms(tmp_path), Terms(tmp_path)
    first, second = Term(1, "a", "10.0.0.1", 5), Term(1, "b", "10.0.0.2", 5)
    assert here.newest() is None
    assert here.claim(first) and not there.claim(second)
    assert there.newest() == first and there.claim(replace(second, number=2)) and here.newest() == replace(second, number=2)
    assert not here.end(first, 0), "another leads by now"
    assert not here.end(Term(2, "b", "10.0.0.2", 5), 0), "of another run"
    assert there.newest() == replace(second, number=2) and there.outcome() is None
    assert there.end(replace(second, number=2), 75)
    assert there.newest() is None and there.outcome() == 75


def test_a_term_of_another_version_is_read(tmp_path: Path) -> None:
    (tmp_path / "term-000003.json").write_text('{"number": 3, "id": "node-a-7-ab", "host": "10.0.0.1", "port": 5, "more": 1}')
    found = Terms(tmp_path).newest()
    assert found is not None and (found.number, found.machine, found.run, found.version) == (3, "node-a", "", "")


def test_requests_are_answered_and_a_lost_connection_is_told() -> None:
    lost: list[str] = []
    server = Server(lambda message: {"order": message["id"]}, lost.append)
    link = Link("127.0.0.1", server.port)
    assert link.ask({"id": "a"}, "order") == {"order": "a"}
    with socket.create_connection(("127.0.0.1", server.port)) as stranger:
        stranger.sendall(b"GET / HTTP/1.0\r\n\r\n")
        assert stranger.recv(10) == b""
    with socket.create_connection(("127.0.0.1", server.port)) as stranger:
        stranger.sendall(b"[1]\n")
        assert stranger.recv(10) == b""
    server.close()
    with pytest.raises(OSError, match="closed"):
        link.ask({"id": "a"}, "order")
    link.close()


def test_a_fault_of_the_leader_is_not_taken_for_a_lost_machine(capsys: pytest.CaptureFixture[str]) -> None:
    server = Server(lambda message: message["missing"], lambda _: None)
    for _ in range(2):
        link = Link("127.0.0.1", server.port)
        with pytest.raises(OSError, match="closed"):
            link.ask({"id": "a"}, "order")
        link.close()
    server.close()
    assert capsys.readouterr().err.count("KeyError: 'missing'") == 1


def test_a_part_is_one_word_of_a_command_line() -> None:
    part = Part("/out", RULES, ["recipe=quickstart", "trainer.sample_prompt=it's"])
    assert part.as_word().startswith(FLAG) and Part.from_word(part.as_word()) == part
    assert overlaid(["parallel.pp=4", "+x=1", "seed=1"], ["parallel.pp=2"]) == ["+x=1", "seed=1", "parallel.pp=2"]
