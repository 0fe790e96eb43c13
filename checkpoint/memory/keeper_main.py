"""The keeper process: `python -m meshloom.checkpoint.memory.keeper_main <socket> <slot> <hours>`. Imports no torch.

It maps the memory that its trainer gives it and keeps it when the trainer dies. Other keepers send it their blocks for its
stripe of parity; recovering trainers fetch what they need. It ends when told to, or after some hours without a trainer.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..digest import seal
from ..faults import install_from_environment, reach
from ..writing.handover import Taker
from .hashing import leaf_digests_by_many
from .parity import span_of
from .wire import GREETING_SECONDS, PIECE, Address, Connection, greet, receive_into, receive_line, send

MOST_STRANGERS = 64  # connections that have not proved themselves yet
MOST_PEERS = 1024


@dataclass
class Version:
    """One snapshot. `members`: ranks of its parity group in order; `received`: members whose block is in the parity."""

    step: int = -1
    image: memoryview = field(default_factory=lambda: memoryview(b""))
    leaves: bytes = b""
    parity: bytearray = field(default_factory=bytearray)
    received: set[int] = field(default_factory=set[int])
    members: list[int] = field(default_factory=list[int])
    block: int = 0
    held: bool = False
    manifest: bytes = b""


def hashers() -> int:
    """Return how many processes may hash for this keeper: its share of half of the node's cores."""
    return min(8, len(os.sched_getaffinity(0)) // (2 * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


class KeeperServer:
    """The versions, and what can be asked about them."""

    def __init__(self, slot: int, secret: str, host: str) -> None:
        """host: this one's address, on which it listens."""
        self.slot = slot
        self.secret = secret
        self.versions: dict[str, Version] = {}
        self.ended = threading.Event()
        self._changed = threading.Condition()
        self._strangers = threading.BoundedSemaphore(MOST_STRANGERS)
        self._peers = threading.BoundedSemaphore(MOST_PEERS)
        self._listener = socket.create_server((host, 0), backlog=MOST_PEERS)
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while True:
            self._strangers.acquire()  # more of them wait at the door
            try:
                link, _ = self._listener.accept()
            except OSError:  # it hung up again, or there is no descriptor left
                self._strangers.release()
                time.sleep(0.1)
                continue
            threading.Thread(target=self._serve, args=(link,), daemon=True).start()

    def _serve(self, link: socket.socket) -> None:
        with link, contextlib.suppress(OSError):
            try:
                known = greet(link, self.secret)
            finally:
                self._strangers.release()
            if known and self._peers.acquire(timeout=GREETING_SECONDS):
                try:
                    self._answer_all(link)
                finally:
                    self._peers.release()

    def _answer_all(self, link: socket.socket) -> None:
        """Answer the requests of one that has proved itself, until it hangs up or its node is gone."""
        link.settimeout(None)
        link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        while (request := receive_line(link)) is not None:
            try:
                self._answer(link, request)
            except (KeyError, ValueError) as error:
                send(link, {"error": f"{type(error).__name__}: {error}"})

    def _answer(self, link: socket.socket, request: dict[str, Any]) -> None:
        if request["do"] == "xor":
            self._take_block(link, request)
            send(link, {})
        elif request["do"] == "get":
            version = self.versions[request["version"]]
            source: Any = getattr(version, request["what"])
            view = memoryview(source)[request["start"] : request["stop"]]
            send(link, {"bytes": len(view)}, view)
        elif request["do"] == "status":
            send(link, {"slot": self.slot, "versions": self._status()})
        elif request["do"] == "exit":
            send(link, {})
            self.ended.set()
        else:
            send(link, {"error": f"unknown request {request['do']!r}"})

    def _status(self) -> list[dict[str, Any]]:
        with self._changed:
            return [
                {
                    "version": token,
                    "step": version.step,
                    "size": len(version.image),
                    "members": version.members,
                    "block": version.block,
                    "manifest": len(version.manifest),
                }
                for token, version in self.versions.items()
                if version.held
            ]

    def _take_block(self, link: socket.socket, request: dict[str, Any]) -> None:
        """XOR another member's block into the parity, piece by piece as it comes."""
        with self._changed:
            version = self.versions.setdefault(request["version"], Version())
            if not version.parity:
                version.parity = bytearray(request["block"])
        piece = bytearray(min(PIECE, max(request["bytes"], 1)))
        for at in range(0, request["bytes"], PIECE):
            part = memoryview(piece)[: min(PIECE, request["bytes"] - at)]
            receive_into(link, part)
            with self._changed:  # several members' blocks meet in the same parity
                target = np.frombuffer(version.parity, np.uint8)[at : at + len(part)]
                np.bitwise_xor(target, np.frombuffer(part, np.uint8), out=target)
        with self._changed:
            version.received.add(request["from"])
            self._changed.notify_all()

    def hold(self, request: dict[str, Any], image: memoryview) -> dict[str, Any]:
        """Keep a snapshot: hash it, give the group its blocks, and wait for theirs."""
        start = time.perf_counter()
        members: list[int] = [member["slot"] for member in request["group"]]
        with self._changed:
            version = self.versions.setdefault(request["version"], Version())
            version.step, version.image, version.members, version.block = request["step"], image, members, request["block"]
        reach("hold.before")
        with ThreadPoolExecutor(max(1, len(members))) as pool:
            sends = [
                pool.submit(self._give_block, request, image, members.index(self.slot), stripe, Address(**member))
                for stripe, member in enumerate(request["group"])
                if member["slot"] != self.slot
            ]
            version.leaves, sealed = seal(leaf_digests_by_many(image, hashers()))
            for sent in sends:
                sent.result()
        reach("hold.sent")
        self._await_group(version, request)
        reach("hold.after")
        return {"digest": sealed, "seconds": time.perf_counter() - start}

    def _await_group(self, version: Version, request: dict[str, Any]) -> None:
        """Wait for the other members' blocks; a member that is late is asked whether it is alive."""
        others = {member["slot"]: Address(**member) for member in request["group"] if member["slot"] != self.slot}
        deadline = time.monotonic() + request["timeout"]
        while True:
            with self._changed:
                if self._changed.wait_for(lambda: version.received >= set(others), 1.0):
                    version.held = True
                    return
                missing = sorted(set(others) - version.received)
            for slot in missing:
                Connection(others[slot], 5.0).close()
            if time.monotonic() > deadline:
                raise TimeoutError(f"no parity block from rank {', '.join(map(str, missing))}")

    def _give_block(self, request: dict[str, Any], image: memoryview, me: int, stripe: int, to: Address) -> None:
        low, high = span_of(me, stripe, request["block"], len(image))
        link = Connection(to, request["timeout"])
        try:
            message = {"do": "xor", "version": request["version"], "block": request["block"], "from": self.slot}
            link.ask(message, image[low:high])
        finally:
            link.close()

    def complete(self, token: str, manifest: bytes) -> None:
        """The snapshot is kept by all ranks: it becomes the version to recover, and the older ones go."""
        reach("complete.before")
        with self._changed:
            self.versions[token].manifest = manifest
            names = list(self.versions)  # in the order of their first sign of life; a faster member may be ahead of us
            for other in names[: names.index(token)]:
                del self.versions[other]
        reach("complete.after")

    def drop(self, token: str) -> None:
        """A snapshot that some rank could not keep."""
        with self._changed:
            self.versions.pop(token, None)


def serve_trainer(server: KeeperServer, link: socket.socket, patience: float) -> None:
    """Do what the trainer says; when it is gone, wait so many seconds for someone to fetch what is kept, if anything is."""
    taker = Taker(link)
    arrivals = select.poll()  # not select(), which knows no descriptor beyond 1023
    arrivals.register(link, select.POLLIN)
    with contextlib.suppress(OSError):  # however the trainer died, and whatever it left unread
        while not server.ended.is_set():
            if arrivals.poll(200) and not _obey(server, taker, link):
                return
    if any(version.held for version in list(server.versions.values())):
        server.ended.wait(patience)


def _obey(server: KeeperServer, taker: Taker, link: socket.socket) -> bool:
    """One request of the trainer; False when it says to end. Raises OSError when the trainer is gone."""
    request = taker.receive()
    reply: dict[str, Any] = {}
    try:
        if request["do"] == "hold":
            reply = server.hold(request, taker.memory(request)[: request["size"]])
        elif request["do"] == "complete":
            manifest = bytearray(request["manifest"])
            send(link, {})  # now it may come: after a line nothing else may be in the socket
            receive_into(link, memoryview(manifest))
            server.complete(request["version"], bytes(manifest))
        elif request["do"] == "drop":
            server.drop(request["version"])
        else:
            assert request["do"] == "exit", request
            return False
    except Exception as error:  # the trainer decides what a failure means
        reply = {"error": f"{type(error).__name__}: {error}"}
    send(link, reply)
    return True


def main() -> None:
    """Entry point."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    install_from_environment()
    link, slot, hours = socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2]), float(sys.argv[3])
    first = receive_line(link)  # the secret comes this way because arguments and environment are for others to read
    if first is None:
        return
    server = KeeperServer(slot, first["secret"], first["host"])
    send(link, {"port": server.port})
    serve_trainer(server, link, hours * 3600)


if __name__ == "__main__":
    main()
