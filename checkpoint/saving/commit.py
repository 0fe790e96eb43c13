"""The target of a save, and its commit: it becomes a checkpoint all at once, or not at all.

On a mounted file system every rank writes into `step-N.tmp-<token>/`; the coordinator adds the manifest, makes everything
durable, gives the folder its final name and replaces `LATEST`. On an object store there is no rename: every rank writes
under names of this save alone, and the manifest, put last, makes them a checkpoint.
"""

from __future__ import annotations

import abc
import contextlib
import json
import logging
import os
import re
import shutil
import threading
import uuid
from pathlib import Path

from ..errors import CheckpointError, DamageError
from ..faults import reach
from ..files import LocalFiles, RemoteFiles, open_files, retrying_once
from ..folder import LATEST, OWNER, check_lengths, is_finished, list_steps, load_manifest, step_name, step_of
from ..identity import RunIdentity
from ..lease import Lease
from ..lock import FolderLock
from ..manifest import MANIFEST, Manifest
from ..takeover import SAVES, take_over, take_over_remote
from ..writing.disk import delete_folder, hide_folder, move_into_place, replace_small, sync_folder, write_small

log = logging.getLogger(__name__)

_LEFTOVER = re.compile(r"(step-\d{8,})\.(?:.+\.)?(tmp|replaced|deleted)-[0-9a-f]+")  # the last suffix says what it is
_SMALL = re.compile(rf"\.({re.escape(LATEST)}|{re.escape(OWNER)})\.[0-9a-f]+")  # one that a crash kept from its name
_TOKENED = re.compile(r"rank-\d{5,}-[0-9a-f]{12}\.(safetensors|leaves)")
NO_ROOM = "make room: an old step goes once the new one is complete, so the disk must hold one step more than checkpoint.keep"


class Target(abc.ABC):
    """A folder of checkpoints that a run saves into.

    run        the run that saves here, once `take_over` has named it
    suspected  a step at which something was wrong with the run: `prune` keeps the newest complete step before it. None: none
    """

    def __init__(self) -> None:
        self.run: RunIdentity | None = None
        self.suspected: int | None = None
        self._commit = 0
        # A step that gets its name again while old steps are chosen and hidden must not be taken for the one it replaces.
        self._announcing = threading.Lock()

    def suffix(self, token: str) -> str:
        """Part of the names of a save's data files that is its alone; empty where its folder is."""
        return ""

    @abc.abstractmethod
    def place(self, step: int, token: str) -> str:
        """Path or URL of the folder that the ranks write a save into."""

    def take_over(self, run: RunIdentity, after: int, step: int | None = None) -> None:
        """Coordinator: the folder is this run's from now on; say what becomes of another run's steps.

        after: number of the commit that the run goes on from; its own have higher ones. step: that commit's, if it is its own
        """
        self._take_over(run, step)
        self.run, self._commit = run, max(self._commit, after)

    @abc.abstractmethod
    def _take_over(self, run: RunIdentity, step: int | None) -> None: ...

    def next_commit(self) -> int:
        """Coordinator: the number of the next commit."""
        self._commit += 1
        return self._commit

    @abc.abstractmethod
    def make_room(self, step: int, size: int, keep: int) -> None:
        """Coordinator: if a save of `size` bytes has no room, prune first; say so if that is not enough."""

    @abc.abstractmethod
    def begin(self, step: int, token: str) -> None:
        """Coordinator: make that folder."""

    @abc.abstractmethod
    def commit(self, manifest: Manifest, text: bytes, token: str) -> None:
        """Coordinator: turn the files that all ranks have made durable into a checkpoint. `text`: the manifest encoded."""

    @abc.abstractmethod
    def discard(self, step: int, token: str) -> None:
        """Coordinator: delete what a failed save left behind; never raises."""

    @abc.abstractmethod
    def prune(self, keep: int) -> list[str]:
        """Coordinator: delete what was replaced, and complete steps beyond the newest `keep` (0: none). Returns their names.

        Raises OSError, once everything else is gone, if something could not be deleted; the next call tries it again.
        """

    @abc.abstractmethod
    def record(self, line: dict[str, object]) -> None:
        """Coordinator: add a line to the log of saves."""

    @abc.abstractmethod
    def close(self) -> None:
        """Let another run save here."""


def open_target(location: str | Path, coordinator: bool, *, saves: bool = True) -> Target:
    """The place to save into. The coordinator locks it against other runs and clears what crashed saves left.

    saves: False to delete steps only. Else raises UnreadableError where a step that may be the newest can't be read
    """
    files = open_files(location)
    if isinstance(files, RemoteFiles):
        return RemoteTarget(files, coordinator, saves)
    return LocalTarget(files.path, coordinator, saves)


def _last_commit(files: LocalFiles | RemoteFiles, saves: bool) -> int:
    listing = list_steps(files)
    if saves:
        listing.refuse_unreadable(newest_only=True)  # its number is not known, and the next must be higher
    return listing.commit


class LocalTarget(Target):
    """A folder on a file system that all nodes mount."""

    def __init__(self, path: Path, coordinator: bool, saves: bool = True) -> None:
        super().__init__()
        self.path = path
        self._lock: FolderLock | None = None
        self._leftovers: list[Path] = []  # under names that no step has
        if coordinator:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = FolderLock(path)
            try:
                self._clear()
                self._commit = _last_commit(LocalFiles(path), saves)
            except BaseException:
                self.close()  # or the next try would be told of another run
                raise

    def place(self, step: int, token: str) -> str:
        """See Target."""
        return str(self.path / f"{step_name(step)}.tmp-{token}")

    def _take_over(self, run: RunIdentity, step: int | None) -> None:
        take_over(self.path, run, step)

    def make_room(self, step: int, size: int, keep: int) -> None:
        """See Target."""
        if shutil.disk_usage(self.path).free >= size:
            return
        pruned = self.prune(keep)
        if pruned:
            log.info("no room for step %d: %s went before it is saved", step, ", ".join(pruned))
        free = shutil.disk_usage(self.path).free
        if free < size:
            log.warning(
                "%s has %.2f GiB free, and step %d takes %.2f GiB; %s",
                self.path, free / 2**30, step, size / 2**30, NO_ROOM,
            )  # fmt: skip

    def begin(self, step: int, token: str) -> None:
        """See Target."""
        Path(self.place(step, token)).mkdir()

    def commit(self, manifest: Manifest, text: bytes, token: str) -> None:
        """See Target."""
        fresh, final = Path(self.place(manifest.step, token)), self.path / step_name(manifest.step)
        _check_files(LocalFiles(fresh), manifest)
        write_small(fresh / MANIFEST, text, "manifest")
        sync_folder(fresh, "manifest.folder")
        self._check()
        with self._announcing:
            replaced = move_into_place(fresh, final)
            if replaced is not None:
                self._leftovers.append(replaced)  # deleting takes time, which `prune` has and a commit has not
            sync_folder(self.path, "commit.folder")
            self._check()
            replace_small(self.path / LATEST, f"{final.name}\n".encode(), "latest")

    def discard(self, step: int, token: str) -> None:
        """See Target."""
        place = Path(self.place(step, token))
        try:
            delete_folder(place, "discard")
        except FileNotFoundError:
            pass  # it had got its name already: what failed came after
        except OSError:
            self._leftovers.append(place)

    def _check(self) -> None:
        """Raises HeldError if a later start of the run has the folder."""
        if self._lock is not None:
            self._lock.check()

    def prune(self, keep: int) -> list[str]:
        """See Target."""
        self._check()
        fault = ""
        with self._announcing:
            doomed = steps_to_prune(LocalFiles(self.path), keep, self.suspected)
            for name in doomed:
                try:
                    self._leftovers.append(hide_folder(self.path / name, "prune"))
                except OSError as error:
                    fault = str(error)
        fault = self._delete_leftovers("prune") or fault
        if doomed:
            sync_folder(self.path, "prune.folder")
        if fault:
            raise OSError(fault)
        return doomed

    def _delete_leftovers(self, boundary: str) -> str:
        """Returns what was in the way of one of them, which stays in the list; empty if nothing was."""
        fault = ""
        for folder in list(self._leftovers):
            try:
                with contextlib.suppress(FileNotFoundError):  # somebody else has deleted it
                    delete_folder(folder, boundary)
                self._leftovers.remove(folder)
            except OSError as error:
                fault = str(error)
        return fault

    def record(self, line: dict[str, object]) -> None:
        """See Target."""
        with (self.path / SAVES).open("ab+") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(0, end - 1))
            cut_off = end > 0 and file.read(1) != b"\n"  # by a crash
            file.write(b"\n" * cut_off + json.dumps(line).encode() + b"\n")

    def close(self) -> None:
        """See Target."""
        if self._lock is not None:
            self._lock.release()

    def _clear(self) -> None:
        for entry in sorted(self.path.iterdir()):
            if _SMALL.fullmatch(entry.name):
                entry.unlink(missing_ok=True)
                continue
            match = _LEFTOVER.fullmatch(entry.name)
            if match is None:
                continue
            final = self.path / match.group(1)
            if match.group(2) == "replaced" and not final.exists():
                entry.rename(final)  # a crash between the two renames of a file system that can't exchange names
            else:
                self._leftovers.append(entry)
        fault = self._delete_leftovers("clear")
        if fault:
            log.warning("what crashed saves left could not be deleted: %s", fault)


class RemoteTarget(Target):
    """A folder on an object store. Should two runs write there all the same, their files have names of their own."""

    def __init__(self, files: RemoteFiles, coordinator: bool, saves: bool = True) -> None:
        super().__init__()
        self.files = files
        self._lease: Lease | None = None
        self._committed: Manifest | None = None
        self._first = True
        if coordinator:
            self._lease = Lease(files)
            try:
                self._commit = _last_commit(files, saves)  # the run before may have committed until it let the folder go
            except BaseException:
                self.close()  # or the next try would be told of another run
                raise

    def suffix(self, token: str) -> str:
        """See Target."""
        return f"-{token}"

    def place(self, step: int, token: str) -> str:
        """See Target."""
        return self.files.label(step_name(step))

    def _take_over(self, run: RunIdentity, step: int | None) -> None:
        take_over_remote(self.files, run, step)

    def make_room(self, step: int, size: int, keep: int) -> None:
        """See Target: an object store has room."""

    def begin(self, step: int, token: str) -> None:
        """See Target."""
        self.files.child(step_name(step)).make()

    def commit(self, manifest: Manifest, text: bytes, token: str) -> None:
        """See Target."""
        folder = self.files.child(step_name(manifest.step))
        assert self._lease is not None
        _check_files(folder, manifest)
        self._lease.check()
        with self._announcing:
            reach("manifest.put.before")
            folder.write(MANIFEST, text)
            reach("manifest.put.after")
            self.files.write(LATEST, f"{step_name(manifest.step)}\n".encode())
            self._committed = manifest
        reach("latest.put.after")

    def discard(self, step: int, token: str) -> None:
        """See Target. A save that failed after its manifest was put stands."""
        folder = self.files.child(step_name(step))
        try:
            if folder.size(MANIFEST) is not None and f'"suffix": "-{token}"'.encode() in folder.read(MANIFEST):
                return
            for name in folder.names():
                if f"-{token}." in name:
                    folder.delete(name)
        except (OSError, CheckpointError) as error:  # a store that is away
            self._first = True  # the next commit looks at earlier steps again
            log.warning("what is left of the failed save of step %d is deleted later: %s", step, error)

    def _clear(self, manifest: Manifest) -> None:
        """Delete what earlier saves of this step left and, once, what crashed saves of earlier steps did."""
        named = {name for file in manifest.files for name in (file.name, file.leaves)}
        folders = {step_name(manifest.step): named}
        if self._first:
            past = [name for name in self.files.names() if (step_of(name) or manifest.step) < manifest.step]
            folders |= {name: set[str]() for name in past if not is_finished(self.files, name)}
        for step, kept in folders.items():
            folder = self.files.child(step)
            for name in folder.names():
                if _TOKENED.fullmatch(name) and name not in kept:
                    folder.delete(name)
            if not kept and not folder.names():
                self.files.delete(step)  # where there are folders
        self._first = False

    def prune(self, keep: int) -> list[str]:
        """See Target."""
        if self._lease is not None:
            self._lease.check()
        committed = self._committed
        if committed is not None:
            self._clear(committed)
        with self._announcing:
            if self._committed is committed:  # no later one has come meanwhile
                self._committed = None
            doomed = steps_to_prune(self.files, keep, self.suspected)
        for name in doomed:
            self.files.delete(f"{name}/{MANIFEST}")  # first: without it the rest is no checkpoint
            self.files.delete(name)
        return doomed

    def record(self, line: dict[str, object]) -> None:
        """Object stores can't append; the trainer's metrics carry the same numbers."""

    def close(self) -> None:
        """See Target."""
        if self._lease is not None:
            self._lease.release()


@retrying_once()
def steps_to_prune(files: LocalFiles | RemoteFiles, keep: int, suspected: int | None = None) -> list[str]:
    """Finished steps beyond the newest `keep` (0: keep all) that are complete.

    suspected: a step at which something was wrong with the run; the newest complete step before it is kept, too

    A step that is damaged as far as can be told without reading its data does not count among those kept, so that
    retention never deletes the last checkpoint that can be restored. One whose manifest could not be read in this process
    stays.
    """
    if keep == 0:
        return []
    good = 0
    doomed: list[str] = []
    listing = list_steps(files)
    for name, reason in listing.unreadable.items():
        log.warning("retention: %s stays, and does not count as kept: %s", name, reason)
    for name in listing.names:
        if name in listing.unreadable:
            continue
        step = step_of(name)
        last_good = suspected is not None and step is not None and step < suspected
        if good >= keep and not last_good:
            doomed.append(name)
            continue
        try:
            check_lengths(files.child(name), load_manifest(files.child(name), arrays=False))
        except CheckpointError as error:
            log.warning("retention: %s does not count as kept: %s", name, error)
            continue
        good += 1
        if last_good:
            suspected = None  # it is the newest before it
    return doomed


def _check_files(folder: LocalFiles | RemoteFiles, manifest: Manifest) -> None:
    """The coordinator must see every rank's file; it would not if the folder were on a disk of one node alone."""
    try:
        check_lengths(folder, manifest)
    except DamageError as error:
        raise CheckpointError(
            f"{error}, as seen from the coordinator; checkpoint.folder must be on a file system that all nodes share"
        ) from error


def new_token() -> str:
    """A name part that no other save has."""
    return uuid.uuid4().hex[:12]
