"""The messages between keepers and trainers: a line of JSON, then as many raw bytes as it announces. No torch.

A connection begins with a proof of both sides that they know the keeper's secret, which itself is never sent. The trainer sends
a nonce, the keeper its own with an HMAC over both, the trainer another HMAC. Until then lines are short and must come soon.
"""

from __future__ import annotations

import hmac
import json
import os
import secrets
import socket
import time
from dataclasses import asdict, dataclass
from typing import Any, cast

from ..errors import CheckpointError

PIECE = 4 * 2**20
STRANGER = "this is nobody who speaks to keepers"  # but has the port that one had once
LINE_BYTES = 16 * 2**20  # room for the digests of 7 TB
LOOPBACK = "127.0.0.1"
ELSEWHERE = "192.0.2.1"  # for a look at the default route: of documentation (RFC 5737), so no host or broadcast of a network
GREETING_BYTES = 1024  # of a line before the other side has proved itself
GREETING_SECONDS = 5.0  # for all of its proof


@dataclass(frozen=True)
class Address:
    """A keeper's address, its secret, and the rank whose file it keeps."""

    host: str
    port: int
    secret: str
    slot: int

    def as_dict(self) -> dict[str, Any]:
        """As plain JSON."""
        return asdict(self)


class Connection:
    """A line to a keeper. One request at a time."""

    def __init__(self, address: Address, timeout: float) -> None:
        self.address = address
        try:
            self._socket = socket.create_connection((address.host, address.port), timeout)
        except OSError as error:
            raise CheckpointError(f"the keeper of rank {address.slot} at {address.host}:{address.port}: {error}") from error
        try:
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            _prove(self._socket, address.secret, timeout)
            self._socket.settimeout(timeout)
        except OSError as error:
            self._socket.close()
            raise CheckpointError(f"the keeper of rank {address.slot} at {address.host}:{address.port}: {error}") from error

    def ask(self, request: dict[str, Any], payload: memoryview | None = None) -> dict[str, Any]:
        """Send a request with its payload; returns the answer. Raises CheckpointError if the keeper refuses or is gone."""
        try:
            send(self._socket, {**request, "bytes": len(payload or b"")}, payload)
            answer = receive_line(self._socket)
        except OSError as error:
            raise CheckpointError(f"the keeper of rank {self.address.slot} is gone: {error}") from error
        if answer is None:
            raise CheckpointError(f"the keeper of rank {self.address.slot} is gone")
        if "error" in answer:
            raise CheckpointError(f"the keeper of rank {self.address.slot}: {answer['error']}")
        return answer

    def fetch(self, version: str, what: str, target: memoryview, start: int) -> None:
        """Fill `target` from byte `start` of a version's image, leaves, parity or manifest."""
        answer = self.ask({"do": "get", "version": version, "what": what, "start": start, "stop": start + len(target)})
        try:
            receive_into(self._socket, target[: answer["bytes"]])
        except OSError as error:
            raise CheckpointError(f"the keeper of rank {self.address.slot} is gone: {error}") from error
        if answer["bytes"] != len(target):
            raise CheckpointError(f"the keeper of rank {self.address.slot} has only {answer['bytes']} of {len(target)} bytes")

    def close(self) -> None:
        """Hang up."""
        self._socket.close()


def send(link: socket.socket, header: dict[str, Any], payload: memoryview | None = None) -> None:
    """Send a line and its bytes."""
    link.sendall(json.dumps(header).encode() + b"\n")
    if payload is not None:
        for at in range(0, len(payload), PIECE):
            link.sendall(payload[at : at + PIECE])


def _hmac(secret: str, side: str, nonces: tuple[str, str]) -> str:
    return hmac.new(secret.encode(), "\n".join((side, *nonces)).encode(), "sha256").hexdigest()


def _prove(link: socket.socket, secret: str, timeout: float) -> None:
    """Prove to a keeper that its secret is known here, and have it prove the same. Raises OSError."""
    deadline = time.monotonic() + timeout
    mine = secrets.token_hex(16)
    send(link, {"nonce": mine})
    hello = receive_line(link, GREETING_BYTES, deadline) or {}
    nonces = (mine, str(hello.get("nonce")))
    if not hmac.compare_digest(str(hello.get("proof")).encode(), _hmac(secret, "keeper", nonces).encode()):
        raise ConnectionError(STRANGER)
    send(link, {"proof": _hmac(secret, "trainer", nonces)})
    if receive_line(link, GREETING_BYTES, deadline) is None:
        raise ConnectionError(STRANGER)


def greet(link: socket.socket, secret: str) -> bool:
    """Have whoever connects to a keeper prove that it knows the secret, and prove the same. Return whether it does.

    Raises OSError, TimeoutError among it, for one that says something else, too much, or nothing.
    """
    deadline = time.monotonic() + GREETING_SECONDS
    hello = receive_line(link, GREETING_BYTES, deadline) or {}
    nonces = (str(hello.get("nonce")), secrets.token_hex(16))
    send(link, {"nonce": nonces[1], "proof": _hmac(secret, "keeper", nonces)})
    answer = receive_line(link, GREETING_BYTES, deadline) or {}
    if not hmac.compare_digest(str(answer.get("proof")).encode(), _hmac(secret, "trainer", nonces).encode()):
        return False
    send(link, {})
    return True


def receive_line(link: socket.socket, limit: int = LINE_BYTES, deadline: float | None = None) -> dict[str, Any] | None:
    """A line; None when the other side has hung up. Raises ConnectionError for one that has no end, or is no such line.

    limit: most bytes before its end; deadline: of `time.monotonic`, by which all of it must be there, or TimeoutError
    """
    line = bytearray()
    while not line.endswith(b"\n"):
        if len(line) > limit:
            raise ConnectionError(STRANGER)
        if deadline is not None:
            link.settimeout(max(deadline - time.monotonic(), 0.001))  # zero would mean not to wait at all
        # One byte at a time after a look ahead: what follows the line is payload and must stay in the socket.
        ahead = link.recv(min(limit, 65536), socket.MSG_PEEK)
        if not ahead:
            return None
        end = ahead.find(b"\n")
        line += link.recv(len(ahead) if end < 0 else end + 1)
    try:
        message = json.loads(line)
    except ValueError:
        raise ConnectionError(STRANGER) from None
    if not isinstance(message, dict):
        raise ConnectionError(STRANGER)
    return cast(dict[str, Any], message)


def receive_into(link: socket.socket, target: memoryview) -> None:
    """Fill a piece of memory. Raises ConnectionError if the other side hangs up before."""
    done = 0
    while done < len(target):
        count = link.recv_into(target[done:])
        if count == 0:
            raise ConnectionError("the other side hung up")
        done += count


def own_host() -> str:
    """The address under which other hosts reach this one: of the interface that leads to MASTER_ADDR.

    On the master itself that may be the loopback, where its name stands for 127.0.1.1 in /etc/hosts. With several hosts the
    interface of the default route is taken then. Raises CheckpointError if there is none.
    """
    master = os.environ.get("MASTER_ADDR", "localhost")
    found = _interface_to(master)
    if master == "localhost" or _is_loopback(master) or not _has_other_hosts():  # all ranks have met on this host
        return found or LOOPBACK
    if _is_loopback(found):
        found = _interface_to(ELSEWHERE)
    if _is_loopback(found):
        raise CheckpointError(
            f"{socket.gethostname()}: no address is found under which other hosts reach the keeper of this rank's snapshots;"
            " set MASTER_ADDR to the first host's address in the network that all of them share"
        )
    return found


def _interface_to(host: str) -> str:
    """Return the address of this host's interface that leads to another host; empty if none does."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))  # nothing is sent
            return str(probe.getsockname()[0])
    except OSError:
        return ""


def _is_loopback(address: str) -> bool:
    return not address or address.startswith("127.")


def _has_other_hosts() -> bool:
    """Return whether ranks of this run are on other hosts, as its launcher has said."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    return ranks > int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
