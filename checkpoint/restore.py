"""Restore: put a checkpoint's values into live tensors, whatever boxes they are, after everything has been checked."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from ..parallel.fragment import Fragment
from .control import Control, Round
from .convert.hugging_face.folder import HuggingFaceFolder, open_folder
from .convert.hugging_face.reading import check_head, fill
from .dtypes import name_of
from .errors import UNREADABLE_FIX, CheckpointError, DamageError, UnreadableError
from .files import Files, hugging_face_folder, is_remote, local_path, open_files
from .folder import StepListing, is_step, list_steps, load_manifest, open_manifest, open_unless_damaged, read_manifest_text
from .identity import RunIdentity
from .manifest import Manifest, StoredArray
from .memory.tier import Recovery, find_recovery, manifest_of, open_recovery
from .reading.items import Raw
from .reading.reader import Reader
from .reading.shared_reader import SharedReader
from .rebuild import NOTHING_LOST, KindOf, RebuildPlan, RebuiltLayers, agree_on_rebuilding
from .verdict import agree_on_verdict, all_matched, some

T = TypeVar("T")

log = logging.getLogger(__name__)
_IN_MEMORY = "keepers:"


@dataclass
class RestoreReport:
    """The report of a restore. Keys are `<role>/<name>`; the three lists are of this rank's fragments and of the whole file.

    source      the step folder that was restored
    state       the plain JSON that was saved with it
    run         the run that saved it; None: an import
    commit      number of its commit
    missing     fragments that the checkpoint has nothing for: left as they were (never when strict)
    mismatched  fragments whose stored array has another shape: left as they were (never when strict)
    unused      arrays of the checkpoint that no rank asked for (none when strict)
    converted   arrays whose element type was changed on the way: key → "F32 → BF16"
    skipped     newer steps that were refused, each with the reason
    rebuilt     layers that were lost, and are made of others
    damage      what was lost: the damage of each file, where layers were rebuilt
    """

    source: str
    step: int
    state: dict[str, Any]
    run: RunIdentity | None = None
    commit: int = 0
    missing: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    converted: dict[str, str] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    rebuilt: list[RebuiltLayers] = field(default_factory=list["RebuiltLayers"])
    damage: list[str] = field(default_factory=list)
    bytes_wanted: int = 0
    bytes_read: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Wanted:
    """The part of a step that a run wants.

    fragments     that the step's values go into
    allow_unused  keys of stored arrays that no rank needs to want, although strict
    """

    fragments: Sequence[Fragment]
    allow_unused: Collection[str] = ()


Chooser = Callable[[Manifest], Wanted]
"""Says what is wanted of a step, where that depends on what the step holds. Every rank asks its own."""


def restore(
    location: str | Path,
    fragments: Iterable[Fragment] | Chooser,
    control: Control,
    *,
    strict: bool = True,
    rebuild: KindOf | None = None,
    timeout: float = 600.0,
    group: ProcessGroup | None = None,
) -> RestoreReport:
    """Fill the fragments' tensors from a step's folder, or from the newest good step of a folder of checkpoints.

    Where a function chooses the fragments, it is asked anew for each step that is tried.

    A version in the memory of keepers that a crashed run left (`checkpoint.memory_every`) counts as a step of the folder.
    `hf:<folder>` is a step whose files have no digests: its values go into the tensors while they are read.

    All ranks call this together. Manifest, coverage and the digest of every byte needed are checked on every rank before
    the first tensor is touched on any. When a folder of checkpoints is given, a damaged step is passed over with a
    warning, by all ranks alike; when a step is given, it is restored or refused. One that can't be read now is always refused:
    a time-out or an I/O error must not set a run back to an older step.

    strict: refuse if a fragment has no stored array of its shape, or if a stored array is wanted by no rank. Otherwise
    what fits is restored and the rest is reported. Element types may always differ; the values are converted.
    rebuild: where a step is given and files of it are missing, make the layers in them of those of their kind beside them
    (`rebuild.py`). None: they are refused.
    group: a process group of the same ranks, with a CPU backend, that nothing else uses meanwhile. With it each byte that
    several ranks need is read by one of them and passed on.

    Raises DamageError (file and block named), UnreadableError where it can't be told which steps there are, or
    CheckpointError; no tensor has been changed then, unless by a folder of Hugging Face's.
    """
    began = time.perf_counter()
    talk = control.begin("restore", timeout)
    try:
        choose = fragments if callable(fragments) else _always(fragments)
        named, candidates = _candidates(location, talk)
        ways = _Ways(strict, named, rebuild if named and hugging_face_folder(location) is None else None)
        report = _restore(location, candidates, choose, talk, ways, group)
    finally:
        talk.leave()
    report.seconds = time.perf_counter() - began
    return report


def _always(fragments: Iterable[Fragment]) -> Chooser:
    wanted = Wanted(list(fragments))
    return lambda _: wanted


@dataclass(frozen=True)
class _Ways:
    """Settings of `restore`: its strictness, whether a step is named, and the kinds of layers for those that are rebuilt.

    named: a step's folder was given, and no folder of steps
    """

    strict: bool
    named: bool
    rebuild: KindOf | None


def _restore(
    location: str | Path,
    candidates: Sequence[str],
    choose: Chooser,
    talk: Round,
    ways: _Ways,
    group: ProcessGroup | None,
) -> RestoreReport:
    skipped: list[str] = []
    for candidate in candidates:
        match, verdict = _try(candidate, location, choose, talk, ways, group)
        lost: list[str] = []
        if "damaged" in verdict and ways.rebuild is not None:
            open_step = functools.partial(_open, candidate, location, talk, group)
            plan, lost = agree_on_rebuilding(open_step, functools.partial(_roles_of, choose), ways.rebuild, talk)
            match, verdict = _try(candidate, location, choose, talk, ways, group, plan)
        if "refused" in verdict:
            raise CheckpointError(verdict["refused"])
        if "damaged" not in verdict:
            assert match is not None
            for tensor, values in match.values:
                with torch.no_grad():
                    tensor.copy_(values)
            match.report.unused, match.report.skipped = verdict["unused"], skipped
            match.report.rebuilt, match.report.damage = match.plan.layers, lost
            return match.report
        damage = DamageError(*verdict["damaged"])
        if ways.named:
            raise damage
        skipped.append(str(damage))
        log.warning("a checkpoint is passed over: %s", damage)
    reasons = "".join(f"\n  {reason}" for reason in skipped)
    raise CheckpointError(f"{location}: there is no complete checkpoint to restore{reasons}")


def _try(
    candidate: str,
    location: str | Path,
    choose: Chooser,
    talk: Round,
    ways: _Ways,
    group: ProcessGroup | None,
    plan: RebuildPlan = NOTHING_LOST,
) -> tuple[_Match | None, dict[str, Any]]:
    """Read a step's values into fresh memory. Return what was read, and the verdict of all ranks (`agree_on_verdict`)."""
    match: _Match | None = None
    try:
        step = _open(candidate, location, talk, group)
        match = _match(step, choose(step.manifest), ways.strict, plan)
        all_match = group is None or all_matched(talk, True)
        answer = _read(match, group) if all_match else {"unused": []}  # another rank says why
    except DamageError as error:
        answer = {"damaged": [error.file, error.what, error.block]}
    except UnreadableError as error:
        fix = "start again once it can be read, or name another step" if ways.named else UNREADABLE_FIX
        answer = {"refused": f"{error}. It need not be damaged, so no older step takes its place: {fix}"}
    except CheckpointError as error:
        answer = {"refused": str(error)}
    except BaseException as error:
        talk.abort(f"restoring from {location} failed: {type(error).__name__}: {error}")
        raise
    if group is not None and match is None:
        all_matched(talk, False)
    return match, agree_on_verdict(talk, answer, ways.strict)


def read_state(location: str | Path) -> dict[str, Any]:
    """The JSON state of a checkpoint: see `read_manifest`."""
    return read_manifest(location).state


def read_manifest(location: str | Path) -> Manifest:
    """The manifest of a step's folder, or of the step that `restore` would try first in a folder of checkpoints.

    For one process, or each for itself. Raises DamageError if a step's manifest is not as written, UnreadableError if it
    can't be read, or which step is the newest can't be told, and CheckpointError if a folder has no complete step.
    """
    foreign = hugging_face_folder(location)
    if foreign is not None:
        return open_folder(foreign).manifest
    if _is_step(location):
        return load_manifest(open_files(location))
    for candidate in _found_in(location):
        manifest: Manifest | None = None
        if not candidate.startswith(_IN_MEMORY):
            manifest = open_unless_damaged(open_files(candidate))
        else:
            with contextlib.suppress(CheckpointError):  # its keeper has gone
                manifest = manifest_of(candidate.removeprefix(_IN_MEMORY))
        if manifest is not None:
            return manifest
    raise CheckpointError(f"{location}: there is no complete checkpoint here")


def holds_checkpoint(folder: str | Path) -> bool:
    """Return whether there is a finished step in a folder of checkpoints, or a version in its keepers' memory."""
    return bool(_found_in(folder))


def _is_step(location: str | Path) -> bool:
    return hugging_face_folder(location) is not None or is_step(open_files(location))


def _candidates(location: str | Path, talk: Round) -> tuple[bool, list[str]]:
    """Return whether a step is named, and the steps to try, in order.

    That is the coordinator's view, so that all ranks do the same. The others ask for nothing before they hear of it: a rank
    whose store is away would leave them waiting.
    """
    if talk.control.rank == 0:
        try:
            named = _is_step(location)
            found = [str(location).rstrip("/")] if named else _steps_to_try(location)
            talk.broadcast(json.dumps([named, found]).encode())
        except BaseException as error:
            talk.abort(f"looking for checkpoints in {location} failed: {type(error).__name__}: {error}")
            raise
    named, found = json.loads(talk.receive("candidates"))
    return named, found


def _steps_to_try(folder: str | Path) -> list[str]:
    listing = list_steps(open_files(folder))
    listing.refuse_unreadable(newest_only=True)
    for fault in listing.unreadable.values():
        log.warning("%s; it is older than the newest step", fault)
    return _found_in(folder, listing)


def _found_in(folder: str | Path, listing: StepListing | None = None) -> list[str]:
    """List the versions in a folder of checkpoints, the one to try first in front. listing: of its steps, if it is there

    A version in the keepers' memory comes first, unless the disk has a newer one, or has one that can't be read and may be it.
    """
    listing = list_steps(open_files(folder)) if listing is None else listing
    found = [f"{str(folder).rstrip('/')}/{name}" for name in listing.names]
    in_memory = None if is_remote(folder) else find_recovery(local_path(folder))
    if in_memory is not None and _is_newest(in_memory, listing):
        found.insert(0, _IN_MEMORY + in_memory.encode())
    return found


def _is_newest(in_memory: Recovery, listing: StepListing) -> bool:
    """Return whether a version in the keepers' memory is of the folder's run and not older than the run's newest on disk."""
    try:
        version = manifest_of(in_memory.encode())
    except CheckpointError:
        return False  # its keeper has gone
    if listing.run is not None and (version.run is None or version.run.id != listing.run):
        return False
    if listing.passed and version.commit <= listing.passed:
        return False
    if listing.names and listing.names[0] in listing.unreadable:
        return False  # the run must not go back past it unawares
    newest = listing.heads[listing.names[0]] if listing.names else None
    return newest is None or (version.commit, version.step) >= (newest.commit, newest.step)


@dataclass
class _Opened:
    """A step that is complete as far as can be told. foreign: the folder of Hugging Face's that it is"""

    files: Files
    manifest: Manifest
    foreign: HuggingFaceFolder | None = None


def _open(candidate: str, location: str | Path, talk: Round, group: ProcessGroup | None) -> _Opened:
    """Open a step, whose coverage is proved. The lengths of files are for those that read them. Raises CheckpointError.

    With a group one rank reads the manifest, or a Hugging Face folder's headers, and passes it to the others.
    """
    path = hugging_face_folder(candidate)
    if path is not None:
        folder = _from_first(group, lambda: open_folder(path))
        if talk.control.rank == 0:
            check_head(folder)
            folder.warn_of_left_out()
        return _Opened(folder.files, folder.manifest, folder)
    files: Files | None = None
    held: list[CheckpointError] = []
    try:
        if candidate.startswith(_IN_MEMORY):
            files = open_recovery(candidate.removeprefix(_IN_MEMORY), local_path(location), talk)
        else:
            files = open_files(candidate)
    except CheckpointError as error:
        held.append(error)
    text = _from_first(group, lambda: None if files is None else read_manifest_text(files))
    if files is None:
        raise held.pop()  # it has no name here: see `errors.py`
    return _Opened(files, open_manifest(files, text))


def _from_first(group: ProcessGroup | None, make: Callable[[], T]) -> T:
    """Return what `make` returns on the group's first rank, or raise its CheckpointError; without a group, this rank's."""
    if group is None:
        return make()
    held: list[Any] = [None]
    if group.rank() == 0:
        try:
            held = [make()]
        except CheckpointError as error:
            held = [error]
        except Exception as error:  # the others wait for a word
            held = [CheckpointError(f"{type(error).__name__}: {error}")]
    dist.broadcast_object_list(held, dist.get_global_rank(group, 0), group)
    if isinstance(held[0], CheckpointError):
        raise held.pop()  # it has no name here: see `errors.py`
    return held[0]


@dataclass
class _Match:
    """The stored arrays matched with the fragments that they go into.

    plan    what is read in the place of arrays that are lost
    values  tensor, and what it will hold; once read
    """

    step: _Opened
    plan: RebuildPlan
    report: RestoreReport
    allow_unused: Collection[str]
    wanted: list[tuple[Fragment, StoredArray]]
    values: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list[tuple[torch.Tensor, torch.Tensor]])


def _match(step: _Opened, chosen: Wanted, strict: bool, plan: RebuildPlan) -> _Match:
    """Check what can be checked without the data."""
    files, manifest, fragments = step.files, step.manifest, chosen.fragments
    report = RestoreReport(files.label(), manifest.step, manifest.state, manifest.run, manifest.commit)
    wanted: list[tuple[Fragment, StoredArray]] = []
    for fragment in fragments:
        array = manifest.arrays.get(fragment.key)
        if array is None:
            report.missing.append(fragment.key)
        elif array.shape != tuple(fragment.global_shape):
            report.mismatched.append(fragment.key)
        else:
            wanted.append((fragment, array))
            live = name_of(fragment.tensor.dtype)
            if live != array.dtype:
                report.converted[fragment.key] = f"{array.dtype} → {live}"
    if strict:
        _refuse_misfits(files, manifest, fragments, report)
    return _Match(step, plan, report, chosen.allow_unused, wanted)


def _roles_of(choose: Chooser, manifest: Manifest) -> set[str]:
    """Return the roles of the arrays of a step that this rank wants."""
    return {fragment.role for fragment in choose(manifest).fragments}


def _read(match: _Match, group: ProcessGroup | None) -> dict[str, Any]:
    """Read this rank's values into fresh memory, all of them checked. Returns what the others should know.

    What has no digests is read into the fragments at once.
    """
    report, wanted, step = match.report, match.wanted, match.step
    if step.foreign is not None:
        traffic = fill(step.foreign, ((fragment.name, fragment.box, fragment.tensor) for fragment, _ in wanted), group)
    else:
        files, manifest = step.files, step.manifest
        reader = Reader(files, manifest) if group is None else SharedReader(files, manifest, group)
        reader.whole_files = not match.plan.layers  # of a file that is cut off, what lost layers are made of may be there
        reads = ((source, fragment.box) for fragment, array in wanted for source in match.plan.reads(manifest, array))
        arrays: Iterator[Raw] = iter(reader.read(reads))
        match.values += [(fragment.tensor, match.plan.value(array, fragment.box, arrays)) for fragment, array in wanted]
        traffic = reader.traffic
    report.bytes_wanted, report.bytes_read = traffic.wanted, traffic.read
    left = step.manifest.arrays.keys() - {array.key for _, array in wanted}
    return {"unused": sorted(left.difference(match.allow_unused)), "source": step.files.label()}


def _refuse_misfits(files: Files, manifest: Manifest, fragments: Sequence[Fragment], report: RestoreReport) -> None:
    shapes = {fragment.key: list(fragment.global_shape) for fragment in fragments}
    wrong = [f"{key} has shape {list(manifest.arrays[key].shape)}, the run wants {shapes[key]}" for key in report.mismatched]
    wrong += [f"{key} is not in it" for key in report.missing]
    if wrong:
        weights = any(key.startswith("weight/") for key in (*report.mismatched, *report.missing))
        fix = "Choose the model whose weights they are" if weights else "With checkpoint.strict=false what fits is loaded"
        raise CheckpointError(f"{files.label()} does not fit this run: {some(wrong)}. {fix}")
