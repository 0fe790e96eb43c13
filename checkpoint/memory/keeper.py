"""A trainer's side of its keeper, the process in whose memory snapshots outlive the trainer."""

from __future__ import annotations

import contextlib
import json
import secrets
import socket
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..folder import KEEPERS
from ..saving.staging import StagingBuffer
from ..writing.handover import Giver
from .wire import Address, Connection, own_host, receive_line, send

PATIENCE_HOURS = 1.0
EXIT_SECONDS = 10.0


class Keeper:
    """Starts the process and announces it in the registry, the folder in which recovering trainers look for keepers.

    timeout: seconds that keepers wait for each other. One that has not answered after twice as many is stuck, and killed.
    """

    def __init__(self, folder: Path, slot: int, timeout: float) -> None:
        self._timeout = timeout
        self._stuck = False
        secret, host = secrets.token_hex(16), own_host()
        here, there = socket.socketpair()
        arguments = [str(there.fileno()), str(slot), str(PATIENCE_HOURS)]
        # It is deliberately not waited for: it goes on when this process ends.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "meshloom.checkpoint.memory.keeper_main", *arguments],
            pass_fds=[there.fileno()],
            stdin=subprocess.DEVNULL,  # nor may it hold the launcher's pipes open
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        there.close()
        here.settimeout(2 * timeout)
        self._link = here
        self._giver = Giver(here)
        with contextlib.suppress(CheckpointError):  # it ended at once, which its answer tells
            self._send({"secret": secret, "host": host})
        hello = self._receive()
        if hello is None:
            raise CheckpointError(f"the keeper process of rank {slot} did not start (exit code {self._process.wait()})")
        self.address = Address(host, hello["port"], secret, slot)
        self._entry = folder / KEEPERS / f"{slot:05d}-{secrets.token_hex(4)}.json"
        self._entry.parent.mkdir(exist_ok=True)
        fresh = self._entry.with_suffix(".new")
        fresh.touch(mode=0o600)
        fresh.write_text(json.dumps(self.address.as_dict()))
        fresh.rename(self._entry)

    @property
    def alive(self) -> bool:
        """Return whether the process runs and answers."""
        return not self._stuck and self._process.poll() is None

    def hold(
        self, buffer: StagingBuffer, size: int, version: str, step: int, group: list[dict[str, Any]], block: int
    ) -> dict[str, Any]:
        """Keep the first `size` bytes of a staging buffer; returns the file's digest once the group has its parity.

        group: the addresses of its members, this keeper among them; block: length of a parity block.
        """
        about = {"size": size, "version": version, "step": step, "group": group, "block": block, "timeout": self._timeout}
        with self._conversation():
            try:
                self._giver.send({"do": "hold", **about}, buffer)
            except OSError as error:
                raise CheckpointError(f"the keeper process is gone: {error}") from error
            return self._reply()

    def complete(self, version: str, manifest: bytes) -> None:
        """Every rank keeps this version: older ones may go."""
        with self._conversation():
            self._send({"do": "complete", "version": version, "manifest": len(manifest)})
            self._reply()
            try:
                self._link.sendall(manifest)
            except OSError as error:
                raise CheckpointError(f"the keeper process is gone: {error}") from error
            self._reply()

    def drop(self, version: str) -> None:
        """Some rank could not keep this version."""
        with self._conversation():
            self._send({"do": "drop", "version": version})
            self._reply()

    def leave(self) -> None:
        """Let the process go on by itself, with what it keeps; if that is nothing, it ends."""
        self._hang_up()

    def exit(self) -> None:
        """End the process: what it keeps is not needed any more."""
        with contextlib.suppress(CheckpointError):
            self._send({"do": "exit"})
        self._hang_up()
        try:
            self._process.wait(EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._entry.unlink(missing_ok=True)

    def _hang_up(self) -> None:
        with contextlib.suppress(OSError):  # it is gone already
            self._link.shutdown(socket.SHUT_RDWR)  # closing says nothing while a child of this process has a copy
        self._link.close()

    @contextlib.contextmanager
    def _conversation(self) -> Generator[None]:
        """Questions and answers; one that is cut short by an interruption (Ctrl-C) is the last."""
        try:
            yield
        except Exception:
            raise
        except BaseException:
            self._give_up()
            raise

    def _give_up(self) -> None:
        self._stuck = True
        self._process.kill()  # an answer that came after all would be taken for that to the next question

    def _send(self, message: dict[str, Any]) -> None:
        try:
            send(self._link, message)
        except OSError as error:
            raise CheckpointError(f"the keeper process is gone: {error}") from error

    def _receive(self) -> dict[str, Any] | None:
        try:
            return receive_line(self._link)
        except TimeoutError:
            self._give_up()
            return None
        except OSError:
            return None

    def _reply(self) -> dict[str, Any]:
        reply = self._receive()
        if reply is None:
            raise CheckpointError(f"the keeper process of rank {self.address.slot} died, or was stuck and is ended")
        if "error" in reply:
            raise CheckpointError(f"the keeper of rank {self.address.slot}: {reply['error']}")
        return reply


def registered(folder: Path) -> dict[Path, Address]:
    """Every keeper announced in a folder of checkpoints: entry of the registry → address."""
    found: dict[Path, Address] = {}
    for entry in sorted((folder / KEEPERS).glob("*.json")):
        with contextlib.suppress(OSError, ValueError, TypeError):
            found[entry] = Address(**json.loads(entry.read_text()))
    return found


def dismiss(entry: Path, address: Address) -> None:
    """End a keeper of an earlier run, if it can be reached, and take it off the registry."""
    with contextlib.suppress(CheckpointError):
        link = Connection(address, 2.0)
        try:
            link.ask({"do": "exit"})
        finally:
            link.close()
    entry.unlink(missing_ok=True)
