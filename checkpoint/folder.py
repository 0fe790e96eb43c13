"""The folder of a run's checkpoints: which steps in it are complete, and which of them is the newest."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path

from .digest import DIGEST_BYTES
from .errors import CheckpointError, DamageError
from .files import Files, LocalFiles, is_remote, open_files
from .manifest import MANIFEST, Manifest, StoredFile, prove_coverage

log = logging.getLogger(__name__)

LATEST = "LATEST"
_STEP = re.compile(r"step-(\d{8,})")


def step_name(step: int) -> str:
    """Name of the folder of a step."""
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """The step that a folder's name stands for; None for any other name, such as that of an unfinished save."""
    match = _STEP.fullmatch(name)
    return int(match.group(1)) if match else None


def load_manifest(files: Files, *, arrays: bool = True) -> Manifest:
    """The manifest of a step's folder, with its digest checked; arrays=False: without them, which is faster.

    Raises DamageError if there is none, or not as written.
    """
    try:
        data = files.read(MANIFEST)
    except FileNotFoundError:
        raise DamageError(files.label(MANIFEST), "the manifest is missing: this is not a finished checkpoint") from None
    return Manifest.decode(data, files.label(MANIFEST), arrays=arrays)


def open_step(files: Files) -> Manifest:
    """The manifest of a step that is complete as far as can be told without reading its data.

    Checks the manifest's digest, that every array is covered, and that every file is there with its length.
    Raises DamageError naming the file.
    """
    manifest = open_manifest(files)
    check_lengths(files, manifest)
    return manifest


def open_manifest(files: Files) -> Manifest:
    """The manifest of a step, whose digest and coverage are right. Raises DamageError."""
    manifest = load_manifest(files)
    prove_coverage(manifest.arrays, [file.bytes for file in manifest.files], files.label(MANIFEST))
    return manifest


def check_lengths(files: Files, manifest: Manifest) -> None:
    """Check that every file is there with its length. Raises DamageError naming the file."""
    for file in manifest.files:
        fault = next(length_faults(files, manifest, file), None)
        if fault is not None:
            try:
                raise fault
            finally:
                del fault  # or it and this frame would hold each other, and their callers, until garbage is collected


def length_faults(files: Files, manifest: Manifest, file: StoredFile) -> Iterator[DamageError]:
    """What is wrong with the lengths of a data file and of the file with its digests."""
    for name, expected in ((file.name, file.bytes), (file.leaves, -(-file.bytes // manifest.leaf_bytes) * DIGEST_BYTES)):
        try:
            size = files.size(name)
        except DamageError as error:
            yield error
            continue
        if size is None:
            yield DamageError(files.label(name), "the file is missing")
        elif size != expected:
            yield DamageError(files.label(name), f"the file has {size} bytes, not {expected}")


def steps_newest_first(files: Files) -> list[str]:
    """Names of the folders of finished steps, the one to resume from first.

    `LATEST` names the last one committed. A step that was committed after it (a crash came before `LATEST` was replaced)
    goes before it; then come the older steps, then the later steps that a run had reached before it was set back.
    """
    names = [name for name in files.names() if step_of(name) is not None and _is_finished(files, name)]
    names.sort(key=lambda name: step_of(name) or 0, reverse=True)
    latest = _latest(files)
    if latest not in names:
        return names
    at = names.index(latest)
    later = names[:at]
    unannounced = [name for name in later if _is_younger(files, name)]
    return [*unannounced, *names[at:], *(name for name in later if name not in unannounced)]


def find_latest(folder: str | Path) -> Path | str | None:
    """The newest finished step in a folder of checkpoints (a Path, or a URL where `folder` is one); None if there is none.

    Anything not committed is ignored, and so is a step whose manifest is damaged or whose files are not all there.
    """
    files = open_files(folder)
    for name in steps_newest_first(files):
        try:
            open_step(files.child(name))
        except CheckpointError:
            continue
        return f"{str(folder).rstrip('/')}/{name}" if is_remote(folder) else Path(folder) / name
    return None


def _is_finished(files: Files, name: str) -> bool:
    try:
        return files.size(f"{name}/{MANIFEST}") is not None
    except DamageError:
        return True  # whoever opens it is told what is wrong with it


def _latest(files: Files) -> str | None:
    try:
        return files.read(LATEST).decode(errors="replace").strip()
    except FileNotFoundError:
        return None
    except DamageError as error:
        log.warning("the newest step is told by its number: %s", error)
        return None


def _is_younger(files: Files, name: str) -> bool:
    """Whether a step was finished after LATEST was last replaced. Only local file systems can tell."""
    if not isinstance(files, LocalFiles):
        return False
    manifest, latest = files.path / name / MANIFEST, files.path / LATEST
    try:
        return manifest.stat().st_mtime_ns > latest.stat().st_mtime_ns
    except FileNotFoundError:  # deleted meanwhile, by the run that saves here
        return False
