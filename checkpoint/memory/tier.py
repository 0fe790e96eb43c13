"""The in-memory tier: snapshots in the keepers' memory, and recovery from them without reading a disk.

A version is *complete* when every rank's keeper holds its file and its group's parity; then some keepers, the witnesses, get
the manifest, which has the digest of every file.
To recover, the coordinator asks every keeper in the registry. A version can be had if some keeper has its manifest and no
group has lost more than one member; the files of lost members are made again from parity, and everything is checked by the
manifest's digests like a checkpoint on a disk.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import zlib
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..control import Round
from ..digest import BLOCK_BYTES, DIGEST_BYTES, LEAF_BYTES
from ..errors import CheckpointError, DamageError
from ..files import Files, RangeReader
from ..manifest import MANIFEST, Manifest
from ..planning.gathering import ChangeGathering
from ..saving.staging import StagingBuffer, StagingPool
from ..stored_file import data_file_names
from .keeper import Keeper, dismiss, registered
from .parity import block_bytes, make_groups, span_of
from .wire import Address, Connection

log = logging.getLogger(__name__)

DOMAIN_VARIABLE = "MESHLOOM_FAILURE_DOMAIN"
ASK_SECONDS = 5.0
WITNESSES = 16  # keepers that have a version's manifest, if there are so many


class MemoryTier:
    """This rank's part in keeping snapshots: its keeper, and the staging buffer that the keeper holds."""

    def __init__(self, folder: Path, rank: int, group: int, pool: StagingPool, timeout: float) -> None:
        self._folder = folder
        self._timeout = timeout
        self._rank = rank
        self._group = group
        self._pool = pool
        self._keeper: Keeper | None = None
        self._held: StagingBuffer | None = None
        self._gathering = ChangeGathering(_join)
        self._arranged = ""  # digest of the keepers that `_place` was arranged for
        self._place: dict[str, Any] = {}

    def arrange(self, talk: Round, size: int, left: Predecessors) -> str:
        """All ranks: agree on whose keepers protect each other. What was agreed stands until a keeper or a size changes.

        size: of this rank's file. Returns why it is not possible where some rank has no keeper; empty if nothing is in the way.
        """
        arranged = self._arranged  # once: another save that fails meanwhile makes this one forget it
        note = {"arranged": arranged}
        note = self._gathering.gather(talk, "keepers", json.dumps([self._introduction(size)]).encode(), note, _same_arrangement)
        if talk.control.rank == 0:
            talk.broadcast(json.dumps(self._decide(talk, note["arranged"], left)).encode())
        verdict = json.loads(talk.receive("keepers"))
        if verdict["arranged"] != arranged and not verdict["fault"]:
            self._place = json.loads(talk.fetch(f"place/{self._rank}"))
            self._arranged = verdict["arranged"]
        return verdict["fault"]

    def _introduction(self, size: int) -> dict[str, Any]:
        """Say where this rank's keeper is and what fails together with it, or why there is none."""
        try:
            if self._keeper is None or not self._keeper.alive:
                if self._keeper is not None:
                    self._keeper.exit()
                self._keeper = None
                self._keeper = Keeper(self._folder, self._rank, self._timeout)
            domain = os.environ.get(DOMAIN_VARIABLE, socket.gethostname())
            return {"address": self._keeper.address.as_dict(), "domain": domain, "size": size}
        except (CheckpointError, OSError) as error:
            return {"error": str(error)}

    def _decide(self, talk: Round, arranged: str, left: Predecessors) -> dict[str, str]:
        """The coordinator's part. Each rank finds its group's addresses and the length of a parity block left for it."""
        known: list[dict[str, Any]] = json.loads(self._gathering.joined)
        left.find({Address(**entry["address"]) for entry in known if "address" in entry})
        fault = next((entry["error"] for entry in known if "error" in entry), "")
        wanted = self._gathering.digest
        if fault or arranged == wanted:
            return {"arranged": wanted, "fault": fault}
        groups = make_groups([entry["domain"] for entry in known], self._group)
        witnesses = choose_witnesses([entry["domain"] for entry in known], groups)
        for group in groups:
            block = block_bytes([known[rank]["size"] for rank in group]) if len(group) > 1 else 0
            addresses = [known[member]["address"] for member in group]
            for rank in group:
                place = {"group": addresses, "block": block, "witness": rank in witnesses}
                talk.post(f"place/{rank}", json.dumps(place).encode())
        return {"arranged": wanted, "fault": ""}

    def hold(self, buffer: StagingBuffer, size: int, version: str, step: int) -> str:
        """Give a snapshot to the keeper; returns the digest of the file."""
        assert self._keeper is not None
        return self._keeper.hold(buffer, size, version, step, self._place["group"], self._place["block"])["digest"]

    def leave_manifest(self, talk: Round, manifest: bytes) -> None:
        """The coordinator's part: leave the manifest for the witnesses, before all are told that the version is complete."""
        talk.post("manifest", manifest)

    def forget(self) -> None:
        """After a failure it is not known who has what."""
        self._gathering.forget()
        self._arranged = ""

    def complete(self, buffer: StagingBuffer, version: str, talk: Round) -> None:
        """All ranks hold this version: the staging buffer of the one before is free again. Witnesses keep the manifest."""
        assert self._keeper is not None
        self._keeper.complete(version, talk.fetch("manifest") if self._place["witness"] else b"")
        self._pool.share(buffer)
        if self._held is not None:
            self._pool.take_back(self._held)
        self._held = buffer

    def drop(self, version: str) -> None:
        """Not all ranks hold this version."""
        if self._keeper is not None:
            self._keeper.drop(version)

    def close(self, keep: bool) -> None:
        """End the keeper, unless what it keeps may be needed: after a run that did not end well."""
        if self._keeper is not None and keep:
            self._keeper.leave()
        elif self._keeper is not None:
            self._keeper.exit()
        if self._held is not None:
            self._pool.take_back(self._held)
        self._keeper = self._held = None


def choose_witnesses(domains: Sequence[str], groups: Sequence[Sequence[int]]) -> set[int]:
    """Choose the ranks whose keepers have the manifest: those of rank 0's group, and others in as many domains as there are.

    domains: of each rank; groups: of ranks that protect each other
    """
    first = list({domain: rank for rank, domain in reversed([*enumerate(domains)])}.values())
    spread = range(0, len(domains), max(1, len(domains) // WITNESSES))
    chosen = {rank for group in groups if 0 in group for rank in group}
    for rank in [*first, *spread]:
        if len(chosen) < WITNESSES:
            chosen.add(rank)
    return chosen


def _join(messages: Sequence[bytes]) -> bytes:
    return json.dumps([entry for message in messages for entry in json.loads(message)]).encode()


def _same_arrangement(notes: list[dict[str, Any]]) -> dict[str, Any]:
    return notes[0] if all(note == notes[0] for note in notes) else {"arranged": ""}


class Predecessors:
    """The keepers that earlier runs have left in a folder of checkpoints, for the coordinator.

    They go as soon as this run has saved something of its own: from then on their steps, be they newer, are of a past that
    it has not gone on from.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._left: dict[Path, Address] | None = None

    def find(self, own: set[Address]) -> None:
        """Take down who there is besides this run's own keepers, all of which are in `own`. The first time counts."""
        if self._left is None:
            self._left = {entry: address for entry, address in registered(self._folder).items() if address not in own}

    def dismiss(self) -> None:
        """End those that were found; one that was not may be of this run."""
        if self._left:
            with ThreadPoolExecutor(64) as pool:  # one whose node is gone takes seconds
                list(pool.map(dismiss, self._left.keys(), self._left.values()))
            self._left = {}


@dataclass(frozen=True)
class Recovery:
    """The sources of a version. `holders`: rank of the saving run → (its keeper, length of its file); `lost`: rank → group."""

    version: str
    step: int
    holders: dict[int, tuple[Address, int]]
    lost: dict[int, dict[str, Any]]
    manifest_at: Address
    manifest_bytes: int

    def encode(self) -> str:
        """As text for the other ranks."""
        holders = {slot: [address.as_dict(), size] for slot, (address, size) in self.holders.items()}
        at = self.manifest_at.as_dict()
        return json.dumps([self.version, self.step, holders, self.lost, at, self.manifest_bytes])

    @classmethod
    def decode(cls, text: str) -> Recovery:
        """From the coordinator's text."""
        version, step, holders, lost, at, size = json.loads(text)
        return cls(
            version,
            step,
            {int(slot): (Address(**address), length) for slot, (address, length) in holders.items()},
            {int(slot): group for slot, group in lost.items()},
            Address(**at),
            size,
        )


def find_recovery(folder: Path) -> Recovery | None:
    """The newest version that can be had from the keepers registered in a folder of checkpoints; None if there is none."""
    entries = registered(folder)
    if not entries:
        return None
    with ThreadPoolExecutor(128) as pool:
        statuses = [status for status in pool.map(_status, entries.values()) if status is not None]
    return choose(statuses)


def _status(address: Address) -> tuple[Address, list[dict[str, Any]]] | None:
    with contextlib.suppress(CheckpointError):
        link = Connection(address, ASK_SECONDS)
        try:
            return address, link.ask({"do": "status"})["versions"]
        finally:
            link.close()
    return None


def choose(statuses: Iterable[tuple[Address, list[dict[str, Any]]]]) -> Recovery | None:
    """The newest recoverable version among what the keepers say they hold."""
    by_version: dict[str, dict[int, tuple[Address, dict[str, Any]]]] = {}
    for address, versions in statuses:
        for info in versions:
            by_version.setdefault(info["version"], {})[address.slot] = (address, info)
    for version, held in sorted(by_version.items(), key=lambda entry: -max(info["step"] for _, info in entry[1].values())):
        groups = {tuple(info["members"]): info["block"] for _, info in held.values()}
        lost: dict[int, dict[str, Any]] = {}
        missing = [[slot for slot in members if slot not in held] for members in groups]
        if any(len(slots) > 1 for slots in missing):
            continue
        for members, block in groups.items():
            lost |= {slot: {"members": list(members), "block": block} for slot in members if slot not in held}
        holders = {slot: (address, int(info["size"])) for slot, (address, info) in held.items()}
        for at, info in held.values():
            if info["manifest"]:
                found = Recovery(version, info["step"], holders, lost, at, info["manifest"])
                ranks = _world_size(found)
                if ranks == len(holders) + len(lost):
                    return found
                if ranks is not None:
                    break
    return None


def _world_size(recovery: Recovery) -> int | None:
    """Number of ranks that saved a version; a group that is lost as a whole shows as a difference. None: it can't be told."""
    try:
        return int(json.loads(_manifest_of(recovery))["world_size"])
    except (CheckpointError, ValueError, KeyError, TypeError) as error:
        where = f"{recovery.manifest_at.host}:{recovery.manifest_at.port}"
        log.warning("the manifest of step %d in the memory of %s can't be read: %s", recovery.step, where, error)
        return None


def _manifest_of(recovery: Recovery) -> bytes:
    """Fetch a version's manifest. Raises CheckpointError if its keeper can't be asked, DamageError if it can't be unpacked."""
    data = bytearray(recovery.manifest_bytes)
    link = Connection(recovery.manifest_at, ASK_SECONDS)
    try:
        link.fetch(recovery.version, "manifest", memoryview(data), 0)
    finally:
        link.close()
    try:
        return zlib.decompress(bytes(data))
    except zlib.error as error:
        raise DamageError(f"memory of step {recovery.step}/{MANIFEST}", f"unpacking it failed: {error}") from error


def manifest_of(text: str) -> Manifest:
    """The manifest of a version, from a keeper. Raises CheckpointError if it can't be had or is damaged."""
    recovery = Recovery.decode(text)
    return Manifest.decode(_manifest_of(recovery), f"memory of step {recovery.step}/{MANIFEST}")


def open_recovery(text: str, folder: Path, talk: Round) -> MemoryFiles:
    """All ranks together: make lost files again, each by one rank, and return the version as a folder of files.

    Raises DamageError if some keeper has gone in the meantime.
    """
    recovery = Recovery.decode(text)
    control = talk.control
    made: dict[int, Any] = {}
    try:
        for slot, group in sorted(recovery.lost.items()):
            if slot % control.world_size == control.rank:
                address, size = _make_again(recovery, slot, group, folder, talk.timeout)
                made[slot] = [address.as_dict(), size]
        message: dict[str, Any] = {"made": made}
    except (CheckpointError, OSError) as error:
        message = {"error": str(error)}
    verdict = json.loads(talk.agree("made", json.dumps(message).encode(), _join_made, lambda joined: joined))
    if "error" in verdict:
        raise DamageError(f"memory of step {recovery.step}", verdict["error"])
    extra = {int(slot): (Address(**address), size) for slot, (address, size) in verdict["made"].items()}
    return MemoryFiles(recovery, {**recovery.holders, **extra})


def _join_made(messages: Sequence[bytes]) -> bytes:
    """Return the results of all of them again, or the first error."""
    said: list[dict[str, Any]] = [json.loads(message) for message in messages]
    failed = next((each for each in said if "error" in each), None)
    return json.dumps(failed or {"made": {slot: entry for each in said for slot, entry in each["made"].items()}}).encode()


def _make_again(recovery: Recovery, slot: int, group: dict[str, Any], folder: Path, timeout: float) -> tuple[Address, int]:
    """Rebuild a lost rank's file out of its group's parity and give it to a keeper of its own."""
    members: list[int] = group["members"]
    block: int = group["block"]
    me = members.index(slot)
    manifest = Manifest.decode(_manifest_of(recovery), f"memory of step {recovery.step}/{MANIFEST}", arrays=False)
    name = data_file_names(slot)[0]
    size = next((file.bytes for file in manifest.files if file.name == name), 0)
    buffer = StagingBuffer(size, pin=False)
    image = buffer.image(size)
    links: dict[int, Connection] = {}
    try:
        for member in members:
            if member != slot:
                links[member] = Connection(recovery.holders[member][0], timeout)
        for stripe, keeper in enumerate(members):
            if stripe == me:
                continue
            low, high = span_of(me, stripe, block, size)
            if low == high:
                continue
            value = np.zeros(block, np.uint8)
            links[keeper].fetch(recovery.version, "parity", value.data, 0)
            for index, member in enumerate(members):
                if index in (me, stripe):
                    continue
                start, stop = span_of(index, stripe, block, recovery.holders[member][1])
                part = np.empty(stop - start, np.uint8)
                links[member].fetch(recovery.version, "image", part.data, start)
                np.bitwise_xor(value[: len(part)], part, out=value[: len(part)])
            image[low:high] = value.data[: high - low]
        keeper = Keeper(folder, slot, timeout)
        try:
            keeper.hold(buffer, size, recovery.version, recovery.step, [keeper.address.as_dict()], 0)
        finally:
            keeper.leave()
    finally:
        for link in links.values():
            link.close()
        image.release()
        buffer.close()  # the keeper has mapped it
    return keeper.address, size


class MemoryFiles(Files):
    """A version in the keepers' memory, read like a step's folder."""

    def __init__(self, recovery: Recovery, holders: dict[int, tuple[Address, int]]) -> None:
        self._recovery = recovery
        self._holders = holders

    def label(self, name: str = "") -> str:
        """See Files."""
        return f"memory of step {self._recovery.step}" + (f"/{name}" if name else "")

    def child(self, name: str) -> Files:
        """See Files."""
        raise AssertionError("a version has no folders inside")

    def _names(self) -> list[str]:
        return [MANIFEST, *(data_file_names(slot)[0] for slot in self._holders)]

    def _size(self, name: str) -> int:
        slot = _slot_of(name)
        if slot not in self._holders:
            raise FileNotFoundError(name)
        length = self._holders[slot][1]
        return length if name.endswith(".safetensors") else (-(-length // LEAF_BYTES) - (-length // BLOCK_BYTES)) * DIGEST_BYTES

    def _sizes(self) -> dict[str, int]:
        return {name: self._size(name) for slot in self._holders for name in data_file_names(slot)}

    def _read(self, name: str) -> bytes:
        try:
            if name == MANIFEST:
                return _manifest_of(self._recovery)
            data = bytearray(self._size(name))
            with contextlib.closing(Connection(self._holders[_slot_of(name)][0], ASK_SECONDS)) as link:
                link.fetch(self._recovery.version, "leaves", memoryview(data), 0)
            return bytes(data)
        except CheckpointError as error:
            raise DamageError(self.label(name), str(error)) from error

    @contextlib.contextmanager
    def reader(self, name: str) -> Generator[RangeReader]:
        """See Files."""
        slot = _slot_of(name)
        try:
            link = Connection(self._holders[slot][0], ASK_SECONDS)
        except (CheckpointError, KeyError) as error:
            raise DamageError(self.label(name), f"can't be reached: {error}") from error
        try:
            what = "image" if name.endswith(".safetensors") else "leaves"
            yield _MemoryReader(link, self._recovery.version, what, self.label(name))
        finally:
            link.close()


class _MemoryReader:
    def __init__(self, link: Connection, version: str, what: str, label: str) -> None:
        self._link = link
        self._version = version
        self._what = what
        self._label = label

    def expect(self, offset: int, length: int) -> None:
        """See RangeReader: memory is as near as can be."""

    def fill(self, target: memoryview, offset: int) -> None:
        """See RangeReader."""
        try:
            self._link.fetch(self._version, self._what, target, offset)
        except CheckpointError as error:
            raise DamageError(self._label, str(error)) from error


def _slot_of(name: str) -> int:
    return int(name.removeprefix("rank-").partition(".")[0])
