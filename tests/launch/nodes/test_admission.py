"""Machines that may take part in a run on several, and the message about one that may not."""

from __future__ import annotations

import socket
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from meshloom import __version__
from meshloom.launch import train
from meshloom.launch.exit_codes import BAD_CONFIG
from meshloom.launch.nodes.addresses import ReservedPort, is_loopback
from meshloom.launch.nodes.admission import credentials, is_stranger, refusal
from meshloom.launch.nodes.agent import Machine
from meshloom.launch.nodes.leader import Order
from meshloom.launch.nodes.part import Part, Rules
from meshloom.launch.nodes.refusals import read_refusals, take_back_refusal, write_refusal
from meshloom.launch.nodes.terms import Term, Terms, meeting_folder
from meshloom.launch.nodes.wire import Server

RULES = Rules(2, 3, {2: ["parallel.pp=2"], 3: []})
PART = Part("/out", RULES, ["recipe=quickstart", "output_dir=/out", "optim.lr=1e-3"])
TERM = Term(4, "node-a-7-ab", "10.0.0.1", 5)
FITS = {"host": "node-b", "address": "10.0.0.2", "common": PART.common, **credentials(TERM)}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({}, ""),
        ({"common": None}, ""),
        ({"common": replace(PART, arguments=["optim.lr=1e-3", "output_dir=/mnt/out", "+recipe=quickstart"]).common}, ""),
        (
            {
                "common": replace(
                    PART, arguments=[*PART.arguments, "launch.address=ib0", "checkpoint.snapshot_folder=/x"]
                ).common
            },
            "",
        ),
        ({"version": "9.9"}, f"node-b can't take part: it has Meshloom 9.9, and the run {__version__}"),
        (
            {"common": replace(PART, rules=replace(RULES, processes=8)).common},
            "node-b can't take part: it has launch.nproc=8, and the run 2",
        ),
        (
            {"common": replace(PART, arguments=["recipe=quickstart", "optim.lr=3e-3"]).common},
            "node-b can't take part: it has optim.lr=3e-3 on its command line, and the run optim.lr=1e-3",
        ),
        (
            {"address": "127.0.0.1"},
            "node-b can't take part: no other host reaches node-b at 127.0.0.1: give launch.address there, an address or an "
            "interface's name",
        ),
        ({"address": "127.0.0.1", "host": "node-a"}, ""),
    ],
)
def test_a_machine_that_does_not_fit_is_refused_by_name(change: dict[str, Any], told: str) -> None:
    assert refusal({**FITS, **change}, PART, TERM) == told


def test_an_agent_of_an_older_version_is_named() -> None:
    older = {name: value for name, value in FITS.items() if name not in ("version", "run", "term", "common")}
    assert not is_stranger(older, TERM) and "it has Meshloom of an older version" in refusal(older, PART, TERM)


def test_a_machine_of_another_run_or_term_asks_for_another_leader() -> None:
    assert not is_stranger(FITS, TERM)
    assert is_stranger({**FITS, "run": "run-of-others"}, TERM) and is_stranger({**FITS, "term": 3}, TERM)


@pytest.mark.parametrize(
    ("host", "is_one"), [("127.0.0.2", True), ("::1", True), ("localhost", True), ("10.0.0.1", False), ("a", False)]
)
def test_addresses_that_lead_each_machine_to_itself(host: str, is_one: bool) -> None:
    assert is_loopback(host) == is_one


def test_a_leader_of_another_version_is_not_followed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    term, told = replace(TERM, version="9.9"), f"node-a leads the run with Meshloom 9.9, and this machine has {__version__}"
    terms = Terms(meeting_folder(tmp_path))
    terms.claim(term)
    machine = Machine(replace(PART, output_dir=str(tmp_path)), cast(Any, SimpleNamespace(root=tmp_path)))
    terms.renew(term.number, 1)
    machine.turn()
    assert machine.turn() > 0, "the leader may be gone: its lease tells"
    terms.renew(term.number, 2)
    machine.turn()
    assert machine.run() == BAD_CONFIG and told in capsys.readouterr().err
    (note,) = read_refusals(terms.folder)
    assert note.startswith(f"{socket.gethostname()} does not take part: {told}") and terms.newest() == term
    machine.close()


def test_a_machine_says_why_its_leader_has_ended_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A leader of another version, for example, refuses all others but this one, and ends for want of machines."""
    why = "too few machines came in 600 s: 1 of at least 2 are here; node-b does not take part: it has Meshloom 9.9"
    server = Server(lambda _: {"order": Order.END, "code": BAD_CONFIG, "said": why}, lambda _: None)
    terms = Terms(meeting_folder(tmp_path))
    terms.claim(Term(1, f"{socket.gethostname()}-7-ab", "127.0.0.1", server.port))
    machine = Machine(replace(PART, output_dir=str(tmp_path)), cast(Any, SimpleNamespace(root=tmp_path)))
    assert machine.run() == BAD_CONFIG and capsys.readouterr().err.endswith(f"the run has ended: {why}\n")
    machine.close()
    server.close()


def test_a_machine_that_missed_the_end_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server, term = Server(lambda _: {"order": Order.WAIT}, lambda _: None), replace(TERM, number=1, host="127.0.0.1")
    term = replace(term, id=f"{socket.gethostname()}-7-ab", port=server.port)
    terms = Terms(meeting_folder(tmp_path))
    terms.claim(term)
    machine = Machine(replace(PART, output_dir=str(tmp_path)), cast(Any, SimpleNamespace(root=tmp_path)))
    assert machine.turn() > 0
    server.close()
    terms.end(term, BAD_CONFIG)
    assert machine.run() == BAD_CONFIG
    assert f"the run has ended with exit code {BAD_CONFIG}, while this machine could not" in capsys.readouterr().err
    machine.close()


def test_a_leader_with_a_loopback_address_does_not_end_other_hosts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They wait, and say so; it lets another lead, which refuses it."""
    terms = Terms(meeting_folder(tmp_path))
    terms.claim(replace(TERM, host="127.0.0.1"))
    machine = Machine(replace(PART, output_dir=str(tmp_path)), cast(Any, SimpleNamespace(root=tmp_path)))
    for count in range(3):
        terms.renew(TERM.number, count)
        assert machine.turn() > 0
    assert terms.apart(TERM.number) == [socket.gethostname()]
    assert "can't be reached at 127.0.0.1:5 (no other host reaches node-a at 127.0.0.1" in capsys.readouterr().err
    terms.release(TERM.number)
    machine.turn()
    newest = terms.newest()
    assert newest is not None and newest.machine == socket.gethostname()
    machine.close()


def test_a_machine_with_a_loopback_address_lets_other_hosts_lead(tmp_path: Path) -> None:
    part = replace(PART, output_dir=str(tmp_path), address="127.0.0.1", rules=replace(RULES, placements={1: []}))
    machine = Machine(part, cast(Any, SimpleNamespace(root=tmp_path)))
    terms, deadline = Terms(meeting_folder(tmp_path)), time.monotonic() + 60
    machine.turn()
    terms.stand_apart(1, socket.gethostname(), socket.gethostname())
    for _ in range(5):
        time.sleep(machine.turn())
    assert terms.lease(1) is not None, "a machine of this host can reach it"
    terms.stand_apart(1, "node-b-7-ab", "node-b")
    while terms.lease(1) is not None:
        assert time.monotonic() < deadline
        time.sleep(machine.turn())
    machine.close()


def test_a_refusal_stands_where_the_other_machines_meet(tmp_path: Path) -> None:
    write_refusal(tmp_path, "nobody is here")
    assert not list(tmp_path.iterdir())
    words = ["recipe=quickstart", "launch.nodes=2:3", "launch.nproc=1", "parallel.tp=7", f"output_dir={tmp_path}"]
    folder = meeting_folder(tmp_path)
    folder.mkdir(parents=True)
    assert train.main(words) == BAD_CONFIG
    (note,) = read_refusals(folder)
    assert note.startswith(f"{socket.gethostname()} does not take part: parallel")
    take_back_refusal(folder)
    assert not list(folder.iterdir())


def test_a_reserved_port_is_free_for_the_one_that_names_it() -> None:
    port = ReservedPort()
    with socket.socket() as other, pytest.raises(OSError, match="Address already in use"):
        other.bind(("", port.number))
    with socket.socket() as store:
        store.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        store.bind(("", port.number))
        store.listen()
        socket.create_connection(("127.0.0.1", port.number)).close()
    port.close()
