"""Strangers at a keeper: they can't read its secret, nor hold its memory, nor keep others out."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path

import pytest

from meshloom.checkpoint.errors import CheckpointError
from meshloom.checkpoint.memory import keeper_main, wire
from meshloom.checkpoint.memory.keeper import Keeper, registered
from meshloom.checkpoint.memory.keeper_main import KeeperServer
from meshloom.checkpoint.memory.wire import Address, Connection, own_host


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Address:
    """A keeper's server in this process, with little patience and one stranger at a time."""
    monkeypatch.setattr(wire, "GREETING_SECONDS", 0.3)
    monkeypatch.setattr(keeper_main, "MOST_STRANGERS", 1)
    server = KeeperServer(0, "secret", own_host())
    return Address(own_host(), server.port, server.secret, 0)


@contextlib.contextmanager
def stranger(address: Address) -> Generator[socket.socket]:
    with socket.create_connection((address.host, address.port), 10.0) as link:
        yield link


def versions(address: Address) -> int:
    link = Connection(address, 10.0)
    try:
        return len(link.ask({"do": "status"})["versions"])
    finally:
        link.close()


def test_no_other_user_can_read_the_secret(tmp_path: Path) -> None:
    keeper = Keeper(tmp_path, 0, 30.0)
    try:
        ((entry, address),) = registered(tmp_path).items()
        assert entry.stat().st_mode & 0o077 == 0
        processes = [path for path in Path("/proc").glob("[0-9]*") if _parent(path) == os.getpid()]
        shown = b"".join((path / name).read_bytes() for path in processes for name in ("cmdline", "environ"))
        assert b"keeper_main" in shown
        assert address.secret.encode() not in shown
        assert versions(address) == 0
    finally:
        keeper.exit()


def _parent(process: Path) -> int:
    with contextlib.suppress(OSError):
        return int((process / "stat").read_text().rpartition(")")[2].split()[1])
    return 0


def test_it_listens_on_one_interface(address: Address) -> None:
    assert address.host == own_host() == "127.0.0.1"
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.2", address.port), 5.0)


@pytest.mark.parametrize(
    ("master", "other_hosts", "chosen"),
    [
        ("node-7", True, "10.1.2.3"),
        ("node-7", False, "127.0.0.1"),
        ("localhost", True, "127.0.0.1"),
        ("node-8", True, "10.1.2.4"),
    ],
)
def test_the_master_does_not_listen_on_the_loopback_for_other_hosts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, master: str, other_hosts: bool, chosen: str
) -> None:
    """node-7, this host, stands for 127.0.1.1 in its /etc/hosts."""
    interfaces = {"node-7": "127.0.0.1", "localhost": "127.0.0.1", "node-8": "10.1.2.4", wire.ELSEWHERE: "10.1.2.3"}
    monkeypatch.setattr(wire, "_interface_to", lambda host: interfaces.get(host, ""))
    monkeypatch.setenv("MASTER_ADDR", master)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2" if other_hosts else "4")
    assert own_host() == chosen
    del interfaces[wire.ELSEWHERE]
    if chosen == "10.1.2.3":
        with pytest.raises(CheckpointError, match="no address is found under which other hosts reach"):
            Keeper(tmp_path, 0, 1.0)


def test_a_stranger_to_the_secret_is_sent_away(address: Address) -> None:
    with pytest.raises(CheckpointError, match="nobody who speaks to keepers"):
        Connection(replace(address, secret="guess"), 5.0)
    assert versions(address) == 0


def test_the_secret_is_not_sent(address: Address) -> None:
    heard: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as trap:

        def listen() -> None:
            link, _ = trap.accept()
            with link:
                heard.append(link.recv(4096))
                link.sendall(b'{"nonce": "00", "proof": "00"}\n')

        thread = threading.Thread(target=listen)
        thread.start()
        with pytest.raises(CheckpointError, match="nobody who speaks to keepers"):
            Connection(replace(address, port=trap.getsockname()[1]), 5.0)
        thread.join()
    assert list(json.loads(heard[0])) == ["nonce"]


def test_a_proof_does_not_serve_twice(address: Address) -> None:
    said: list[bytes] = []
    for known in (True, False):  # the second time what was overheard is said again
        with stranger(address) as link:
            link.sendall(b'{"nonce": "11"}\n')
            nonces = ("11", json.loads(link.recv(4096))["nonce"])
            proof = wire._hmac("secret", "trainer", nonces)  # pyright: ignore[reportPrivateUsage]
            said = said or [json.dumps({"proof": proof}).encode() + b"\n"]
            link.sendall(said[0])
            assert link.recv(4096) == (b"{}\n" if known else b"")


def test_silent_and_endless_strangers_are_sent_away(address: Address) -> None:
    with stranger(address) as link:  # the only one that may be there
        assert link.recv(1) == b""
    with stranger(address) as link:
        with contextlib.suppress(OSError):
            for _ in range(64):
                link.sendall(bytes(2**16))
        with contextlib.suppress(ConnectionError):
            assert link.recv(1) == b""
    assert versions(address) == 0
