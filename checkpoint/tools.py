"""Verify, summarize and prune finished checkpoints, without PyTorch."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from ..parallel.box import Box
from .digest import DIGEST_BYTES, block_digests, leaf_digests, text_digest
from .errors import CheckpointError, DamageError, UnreadableError
from .files import Files, open_files
from .folder import is_step, length_faults, load_manifest, open_manifest, part_faults, step_folders, steps_newest_first
from .reading.reader import Reader
from .saving.commit import open_target
from .takeover import SAVES

Fault = DamageError | UnreadableError


def verify(files: Files) -> Iterator[Fault | int]:
    """Read every byte of a step. Yields the number of bytes of each good block, and an error for each bad thing found."""
    try:
        manifest = open_manifest(files)
        sizes = files.sizes()
    except (DamageError, UnreadableError) as error:
        yield error
        return
    reader = Reader(files, manifest)
    reader.whole_files = False
    told: set[str] = set()
    for number, file in enumerate(manifest.files):
        lengths = length_faults(files, manifest, file, sizes)
        for found in itertools.chain(lengths, verify_file(reader, number, sizes), _faults_behind(reader, number, sizes)):
            if str(found) not in told or isinstance(found, int):  # the length of a host's file is wrong for all its segments
                yield found
            told.add(str(found))


def verify_file(reader: Reader, number: int, sizes: Mapping[str, int | None]) -> Iterator[Fault | int]:
    """Read every byte of a rank's data and their digests. Yields as `verify` does. sizes: of the step's files

    A segment that is whole is good, though the file of its host be too short for others.
    """
    files, manifest = reader.files, reader.manifest
    file = manifest.files[number]
    faults = {fault.file: fault for fault in part_faults(files, manifest, file, sizes)}
    yield from faults.values()
    if files.label(file.name) in faults:
        return
    try:
        good = not faults
        for found in _verify_blocks(reader, number, proved=files.label(file.leaves) not in faults):
            good = good and isinstance(found, int)
            yield found
        if good:
            _check_header(reader, number)
    except (DamageError, UnreadableError) as error:  # a disk that can't read it, or a file that is gone by now
        yield error


def _verify_blocks(reader: Reader, number: int, *, proved: bool) -> Iterator[Fault | int]:
    """Read a data file. proved: its digests are there; otherwise the file is good or bad as a whole."""
    files, manifest = reader.files, reader.manifest
    file, leaf, span = manifest.files[number], manifest.leaf_bytes, manifest.block_bytes
    listed = file.blocks
    if proved:
        try:
            listed = reader.blocks_of(number)
        except (DamageError, UnreadableError) as error:
            yield error
    leaves: list[bytes] = []
    lengths: list[int] = []
    buffer = bytearray(span)
    with files.reader(file.name) as opened:
        for block, at in enumerate(range(0, file.bytes, span)):
            view = memoryview(buffer)[: min(span, file.bytes - at)]
            opened.fill(view, file.start + at)
            leaves.append(leaf_digests(view, leaf))
            lengths.append(len(view))
            if listed and block_digests(leaves[-1], leaf, span) != listed[block * DIGEST_BYTES : (block + 1) * DIGEST_BYTES]:
                yield DamageError(files.label(file.title), "its bytes do not match the manifest", block)
            elif listed:
                yield len(view)
    whole = b"".join(leaves)
    if not listed:
        if text_digest(block_digests(whole, leaf, span)) != file.digest:
            yield DamageError(files.label(file.title), "its bytes do not match the manifest")
        else:
            yield from lengths
    elif proved and block_digests(reader.leaves_of(number), leaf, span) != listed:
        yield DamageError(files.label(file.leaves_title), f"it does not hold the digests of {file.name}")


def _faults_behind(reader: Reader, number: int, sizes: Mapping[str, int | None]) -> Iterator[Fault]:
    """Check that only zeros follow a segment's digests, up to where the next one begins. Nobody needs them to restore."""
    files, manifest = reader.files, reader.manifest
    file = manifest.files[number]
    if not file.is_segment or sizes.get(file.name) != manifest.lengths[file.name]:
        return
    start = file.digests_start + manifest.leaves_bytes(file)
    rest = bytearray(manifest.segment_end(file) - start)
    try:
        with files.reader(file.name) as opened:
            opened.fill(memoryview(rest), start)
        if any(rest):
            yield DamageError(files.label(file.title), f"its digests end at byte {start}, and not only zeros follow")
    except (DamageError, UnreadableError) as error:
        yield error


def _check_header(reader: Reader, number: int) -> None:
    """Check that a file holds the boxes that the manifest says, one after the other, and no other. Raises DamageError."""
    file, index = reader.manifest.files[number], reader.index_of(number)
    found = sorted((stored.start, stored.stop) for _, stored in index.boxes(reader.manifest))
    edges = [file.header, *(stop for _, stop in found)]
    if len(found) != len(index.names) or [*(start for start, _ in found), file.bytes] != edges:
        raise DamageError(index.label, "its header and the manifest disagree")


def prune(location: str | Path, keep: int) -> list[str]:
    """Delete complete steps beyond the newest `keep` of a folder of checkpoints, or of a run. Returns their names.

    Raises CheckpointError if there are none, if a run is saving there, or keep is 0.
    """
    if keep < 1:
        raise CheckpointError("prune: keep at least 1 step")
    if is_step(open_files(location)):
        raise CheckpointError(f"{location}: this is a step; give the folder of all of them")
    in_run = not steps_newest_first(open_files(location)) and bool(step_folders(location, listing=True))
    target = open_target(f"{str(location).rstrip('/')}/checkpoints" if in_run else location, coordinator=True, saves=False)
    try:
        return target.prune(keep)
    finally:
        target.close()


def saves(location: str | Path) -> list[dict[str, object]]:
    """The log of saves of a folder of checkpoints, oldest first, without lines that a crash cut off.

    Raises CheckpointError if there is none.
    """
    files = open_files(location)
    for folder in (files, files.child("checkpoints")):
        if folder.size(SAVES) is not None:
            lines: list[dict[str, object]] = []
            for line in folder.read(SAVES).decode(errors="replace").splitlines():
                with contextlib.suppress(ValueError):
                    lines.append(json.loads(line))
            return lines
    raise CheckpointError(f"{files.label()}: there is no {SAVES} here; it is written by runs that save to a mounted folder")


def summary(files: Files) -> dict[str, object]:
    """Summarise a step for `inspect`: counts and bytes by role, types, files, and the keys of its state."""
    manifest = load_manifest(files)
    roles: dict[str, dict[str, int]] = {}
    for array in manifest.arrays.values():
        role = roles.setdefault(array.role, {"arrays": 0, "elements": 0, "bytes": 0})
        role["arrays"] += 1
        role["elements"] += Box.whole(array.shape).numel
        role["bytes"] += array.bytes
    return {
        "path": files.label(),
        "step": manifest.step,
        "saved_by_ranks": manifest.world_size,
        "bytes": manifest.bytes,
        "files": {file.name: manifest.lengths[file.name] for file in manifest.files},
        "roles": roles,
        "state": manifest.state,
    }
