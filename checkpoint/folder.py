"""The folder of a run's checkpoints: which steps in it are complete, and which of them is the newest."""

from __future__ import annotations

import itertools
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import UNREADABLE_FIX, CheckpointError, DamageError, UnreadableError
from .files import Files, LocalFiles, is_remote, local_path, open_files, retrying_once
from .identity import RunIdentity
from .manifest import MANIFEST, Manifest, prove_manifest
from .stored_file import StoredFile

log = logging.getLogger(__name__)

LATEST = "LATEST"
OWNER = "run.json"
KEEPERS = ".memory"
"""Folder in which the keepers of in-memory snapshots are registered."""
_STEP = re.compile(r"step-(\d{8,})")


def step_name(step: int) -> str:
    """Name of the folder of a step."""
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """The step that a folder's name stands for; None for any other name, such as that of an unfinished save."""
    match = _STEP.fullmatch(name)
    return int(match.group(1)) if match else None


def is_step(files: Files) -> bool:
    """Return whether a folder is, or ought to be, that of a step, and not one of many."""
    return step_of(files.label().rpartition("/")[2]) is not None or files.size(MANIFEST) is not None


def load_manifest(files: Files, *, arrays: bool = True) -> Manifest:
    """The manifest of a step's folder, with its digest checked; arrays=False: without them, which is faster.

    Raises DamageError if there is none, or not as written, and UnreadableError if it can't be read.
    """
    return Manifest.decode(read_manifest_text(files), files.label(MANIFEST), arrays=arrays)


def read_manifest_text(files: Files) -> bytes:
    """The manifest of a step's folder, unchecked. Raises DamageError if there is none, UnreadableError if it can't be read."""
    try:
        return files.read(MANIFEST)
    except FileNotFoundError:
        raise DamageError(files.label(MANIFEST), "the manifest is missing: this is not a finished checkpoint") from None


def open_step(files: Files) -> Manifest:
    """The manifest of a step that is complete as far as a listing of its folder tells: its files are there with their lengths.

    Checks the manifest's digest, and that every array is covered. Raises DamageError naming the file.
    """
    manifest = open_manifest(files)
    check_lengths(files, manifest)
    return manifest


def open_manifest(files: Files, text: bytes | None = None) -> Manifest:
    """The manifest of a step, whose digest and coverage are right. Raises DamageError. text: it, where it is read already"""
    manifest = Manifest.decode(read_manifest_text(files) if text is None else text, files.label(MANIFEST))
    prove_manifest(manifest, files.label(MANIFEST))
    return manifest


def check_lengths(files: Files, manifest: Manifest) -> None:
    """Check that every file is there with its length. Raises DamageError naming the file."""
    sizes = files.sizes()
    for file in manifest.files:
        raise_first(length_faults(files, manifest, file, sizes))


def raise_first(faults: Iterator[CheckpointError]) -> None:
    """Raise the first of some faults, if there is one."""
    held = list(itertools.islice(faults, 1))
    if held:
        raise held.pop()  # it has no name here: see `errors.py`


def length_faults(files: Files, manifest: Manifest, file: StoredFile, sizes: Mapping[str, int | None]) -> Iterator[DamageError]:
    """List what is wrong with the lengths of a data file and of the file with its digests. sizes: of the folder's files."""
    for name in dict.fromkeys((file.name, file.leaves)):
        size, expected = sizes.get(name), manifest.lengths[name]
        if size is None:
            yield DamageError(files.label(name), "the file is missing")
        elif size != expected:
            yield DamageError(files.label(name), f"the file has {size} bytes, not {expected}")


def part_faults(files: Files, manifest: Manifest, file: StoredFile, sizes: Mapping[str, int | None]) -> Iterator[DamageError]:
    """List as `length_faults` does, but for one rank alone: its segment needs the file of its host up to its digests' end."""
    size = sizes.get(file.name)
    if size is None or not file.is_segment or size < file.digests_start + manifest.leaves_bytes(file):
        yield from length_faults(files, manifest, file, sizes)


@dataclass(frozen=True)
class StepHead:
    """The members of a step's manifest that a listing needs; for their meaning see `Manifest`."""

    step: int
    run: RunIdentity | None
    commit: int


_FileIdentity = tuple[int, ...]  # device, inode, time of change and size; (): there is no such file
_heads_read: dict[Path, dict[str, tuple[_FileIdentity, StepHead]]] = {}  # of each local folder, by the step's name


@dataclass(frozen=True)
class StepListing:
    """The finished steps of a folder of checkpoints.

    run    id of the run that the folder belongs to; None: no run has saved here, only imports
    heads  name → the head of its manifest, of every finished step; None: it is damaged, or can't be read now
    names  of the run's own steps, the one to resume from first
    passed  number of the last commit that the run has left behind by going back to an earlier step; 0: none
    unreadable  name → why, of the steps whose manifest can't be read now
    """

    run: str | None
    heads: dict[str, StepHead | None]
    names: list[str]
    passed: int = 0
    unreadable: dict[str, UnreadableError] = field(default_factory=dict[str, UnreadableError])

    @property
    def commit(self) -> int:
        """Number of the last commit in the folder, as far as it can be read; 0: none has one."""
        return max((head.commit for head in self.heads.values() if head is not None), default=0)

    def has_steps_of(self, run: RunIdentity) -> bool:
        """Return whether a run has saved here."""
        return any(head is not None and head.run is not None and head.run.id == run.id for head in self.heads.values())

    def refuse_unreadable(self, *, newest_only: bool = False) -> None:
        """Raise UnreadableError where a step can't be read: it may be another run's.

        newest_only: only where it may be the newest, so that what is saved now might count as older than that one
        """
        first = next(iter(self.names if newest_only else self.unreadable), "")
        fault = self.unreadable.get(first)
        if fault is not None:
            fear = "the newest step" if newest_only else "another run's"
            raise UnreadableError(fault.file, f"{fault.what}. It may be {fear}: {UNREADABLE_FIX}")


def steps_newest_first(files: Files) -> list[str]:
    """Names of the folders of the finished steps of a folder's run, the one to resume from first. See `list_steps`."""
    return list_steps(files).names


@retrying_once()
def list_steps(files: Files) -> StepListing:
    """Read the manifests of a folder of checkpoints, and put the steps of its run in order.

    The newest step is the one that was committed last, by the numbers in the manifests; or, until there is a later commit, the
    one that the run was set back to. Then come the older steps, then the later steps that the run had reached before it was
    set back. `LATEST` is a hint: it decides among steps of format
    versions 1 and 2, which have no numbers, and it names the step that was newest where that one's manifest can't be read.

    Steps of other runs are left out. Imports count as long as the run has saved nothing itself. A step whose manifest is
    damaged counts, so that whoever opens it is told. So does one whose manifest can't be read now; it comes first if it may be
    the newest, so that none goes on from an older one unawares. Once one can't be read for all tries, the others are tried
    once. Raises DamageError or UnreadableError where the folder can't be listed, or its owner or `LATEST` can't be read.
    """
    finished = [name for name in files.names() if step_of(name) is not None and is_finished(files, name)]
    found = _local_heads(files, finished) if isinstance(files, LocalFiles) else {name: _head(files, name) for name in finished}
    heads = {name: head if isinstance(head, StepHead) else None for name, head in found.items()}
    unreadable = {name: head for name, head in found.items() if isinstance(head, UnreadableError)}
    run = _owner(files, heads)
    own = _steps_of(run, heads)
    last = max((head.commit for head in own.values() if head is not None), default=0)
    back = _read_set_back(files)
    passed = 0
    if back is None or back.name not in own or last > back.last:
        names = _in_order(own, _latest(files))
    else:
        head, names = own[back.name], _in_order(own, back.name, given=True)
        passed = last if head is not None and head.commit < last else 0
    newest = next((name for name in names if own[name] is not None), None)
    if back is not None and back.name not in own and last <= back.last:
        newest = None  # it was the step set back to, which is gone, or one saved after that
    return StepListing(run, heads, _unreadable_first(names, unreadable, newest), passed, unreadable)


def _unreadable_first(names: list[str], unreadable: Mapping[str, UnreadableError], newest: str | None) -> list[str]:
    """Return the names with those first that can't be read and may be the newest.

    newest: the one committed last of those that can be read and are not damaged. A step that can't be read may have been
    committed later unless its number is lower. None: it can't be told, so any may have been
    """
    first = [name for name in names if name in unreadable and not _is_older(name, newest)]
    if names and names[0] in unreadable and names[0] not in first:
        first.insert(0, names[0])  # as `LATEST` says, or the run was set back to it
    return [*first, *(name for name in names if name not in first)]


def _is_older(name: str, newest: str | None) -> bool:
    return newest is not None and (step_of(name) or 0) < (step_of(newest) or 0)


def read_owner(files: Files) -> RunIdentity | None:
    """The run that a folder was last taken over by; None: no run has said so, or what it said makes no sense.

    Raises UnreadableError if it can't be read.
    """
    try:
        return RunIdentity.from_dict(json.loads(files.read(OWNER)))
    except FileNotFoundError:
        return None
    except (DamageError, ValueError, KeyError, TypeError) as error:
        log.warning("whose checkpoints these are is told by the newest one: %s: %s", files.label(OWNER), error)
        return None


def _local_heads(files: LocalFiles, names: Sequence[str]) -> dict[str, StepHead | CheckpointError]:
    """Return the head of each of these steps of a local folder.

    A start lists the folder several times, so heads are kept: a manifest is never changed but only replaced, and is read again
    only if it is another file. Whoever opens a step reads its manifest again, and checks it.
    """
    known = _heads_read.get(files.path, {})
    heads: dict[str, StepHead | CheckpointError] = {}
    read: dict[str, tuple[_FileIdentity, StepHead]] = {}
    for name in names:
        identity = _identity(files.path / name / MANIFEST)
        kept_for, kept = known.get(name, (None, None))
        head = heads[name] = kept if kept is not None and kept_for == identity else _head(files, name)
        if isinstance(head, StepHead):
            read[name] = identity, head
    _heads_read[files.path] = read  # steps that are gone leave nothing behind
    return heads


def _identity(manifest: Path) -> _FileIdentity:
    try:
        found = manifest.stat()
    except OSError:
        return ()
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size


def _head(files: Files, name: str) -> StepHead | CheckpointError:
    """Return the head of a step's manifest, or why there is none."""
    try:
        return _read_head(files.child(name))
    except CheckpointError as error:
        return error


def _read_head(files: Files) -> StepHead:
    manifest = load_manifest(files, arrays=False)
    return StepHead(manifest.step, manifest.run, manifest.commit)


def _owner(files: Files, heads: dict[str, StepHead | None]) -> str | None:
    owner = read_owner(files)
    if owner is not None:
        return owner.id
    saved = [head for head in heads.values() if head is not None and head.run is not None]
    newest = max(saved, key=lambda head: (head.commit, head.step), default=None)
    return None if newest is None or newest.run is None else newest.run.id


def _steps_of(run: str | None, heads: dict[str, StepHead | None]) -> dict[str, StepHead | None]:
    def belongs(head: StepHead | None) -> bool:
        return head is None or (head.run is not None and head.run.id == run)

    own = {name: head for name, head in heads.items() if belongs(head)}
    if any(own.values()):
        return own
    return {name: head for name, head in heads.items() if belongs(head) or (head is not None and head.run is None)}


@dataclass(frozen=True)
class SetBack:
    """The step that the folder's run went on from, and the number of the last commit that the folder had then."""

    name: str
    last: int

    def as_dict(self) -> dict[str, Any]:
        """Return the member of the owner's file."""
        return {"went_on_from": {"name": self.name, "last": self.last}}


def _read_set_back(files: Files) -> SetBack | None:
    try:
        return SetBack(**json.loads(files.read(OWNER))["went_on_from"])
    except (FileNotFoundError, DamageError, ValueError, KeyError, TypeError):
        return None


def _in_order(heads: dict[str, StepHead | None], latest: str | None, given: bool = False) -> list[str]:
    """Return the names, the newest first. given: `latest` is known to be it."""
    names = sorted(heads, key=lambda name: step_of(name) or 0, reverse=True)
    counted = {name: head for name, head in heads.items() if head is not None and head.commit > 0}
    if given:
        counted = {}
    newest = max(counted, key=lambda name: counted[name].commit, default=latest if latest in heads else None)
    if newest is not None:
        at = names.index(newest)
        names = [*names[at:], *names[:at]]
    if latest is not None and latest in heads and heads[latest] is None:
        names.remove(latest)
        names.insert(0, latest)
    return names


def find_latest(folder: str | Path) -> Path | str | None:
    """The newest finished step in a folder of checkpoints (a Path, or a URL where `folder` is one); None if there is none.

    Anything not committed is ignored, and so is a step whose manifest is damaged or whose files are not all there
    with their lengths. Raises UnreadableError where that can't be told.
    """
    found = _newest_whole(open_files(folder))
    if found is None:
        return None
    return f"{str(folder).rstrip('/')}/{found[0]}" if is_remote(folder) else local_path(folder) / found[0]


def _newest_whole(files: Files) -> tuple[str, Manifest] | None:
    listing = list_steps(files)
    for name in listing.names:
        fault = listing.unreadable.get(name)
        if fault is not None:
            raise UnreadableError(fault.file, fault.what)  # anew: the listing must not hold these frames
        manifest = open_unless_damaged(files.child(name))
        if manifest is not None:
            return name, manifest
    return None


def open_unless_damaged(files: Files) -> Manifest | None:
    """Return what `open_step` does; None for a step that is none to go on from. Raises UnreadableError."""
    try:
        return open_step(files)
    except UnreadableError:
        raise
    except CheckpointError:
        return None


def read_newest(location: str | Path) -> Manifest | None:
    """Return the manifest of a step's folder, or of the newest finished step on the disk in a folder of checkpoints.

    None for a folder without one. Raises DamageError where the manifest of a given step is not as written, and
    UnreadableError where that can't be told.
    """
    files = open_files(location)
    if is_step(files):
        return load_manifest(files)
    found = _newest_whole(files)
    return None if found is None else found[1]


def is_finished(files: Files, name: str) -> bool:
    """Return whether a step of a folder has a manifest, or may have one that can't be read."""
    try:
        return files.size(f"{name}/{MANIFEST}") is not None
    except (DamageError, UnreadableError):
        return True  # whoever opens it is told what is wrong with it


def _latest(files: Files) -> str | None:
    try:
        return files.read(LATEST).decode(errors="replace").strip()
    except FileNotFoundError:
        return None
    except DamageError as error:
        log.warning("the newest step is told by its number: %s", error)
        return None


def step_folders(location: str | Path, *, listing: bool = False) -> list[Files]:
    """The step at a location, or all finished steps in a folder of checkpoints (or of a run), newest first.

    listing: for one that goes on where a step can't be read, which comes first then if it may be the newest

    Raises CheckpointError if there is none and, unless for a listing, UnreadableError where the newest can't be told.
    """
    files = open_files(location)
    if is_step(files):
        return [files]
    for folder in (files, files.child("checkpoints")):
        found = list_steps(folder)
        if not listing:
            found.refuse_unreadable(newest_only=True)
        if found.names:
            return [folder.child(name) for name in found.names]
    raise CheckpointError(f"{files.label()}: there is no checkpoint here; give a step-… folder or a folder of them")
