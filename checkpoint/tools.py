"""Verify, summarize and prune finished checkpoints, without PyTorch."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from ..parallel.box import Box
from .digest import block_digests, leaf_digests, text_digest
from .errors import CheckpointError, DamageError
from .files import Files, open_files
from .folder import length_faults, load_manifest, open_manifest, step_folders, steps_newest_first
from .manifest import MANIFEST, Manifest, entry_shape
from .reading.index import FileIndex, entry_name
from .reading.reader import Reader
from .saving.commit import open_target
from .takeover import SAVES


def verify(files: Files) -> Iterator[DamageError | int]:
    """Read every byte of a step. Yields the number of bytes of each good block, and an error for each bad thing found."""
    try:
        manifest = open_manifest(files)
    except DamageError as error:
        yield error
        return
    sizes, reader = files.sizes(), Reader(files, manifest)
    for number, file in enumerate(manifest.files):
        faults = {fault.file: fault for fault in length_faults(files, manifest, file, sizes)}
        yield from faults.values()
        if files.label(file.name) in faults:
            continue
        try:
            good = True
            for found in _verify_blocks(files, manifest, reader, number, files.label(file.leaves) not in faults):
                good = good and isinstance(found, int)
                yield found
            if good:
                yield from _verify_header(files, manifest, number)
        except DamageError as error:  # a disk that can't read it, or a file that is gone by now
            yield error


def _verify_blocks(files: Files, manifest: Manifest, reader: Reader, number: int, proved: bool) -> Iterator[DamageError | int]:
    """Read a data file. proved: its digests are there; otherwise the file is good or bad as a whole."""
    file, leaf, span = manifest.files[number], manifest.leaf_bytes, manifest.block_bytes
    listed: list[str] = file.blocks
    if proved:
        try:
            listed = reader.blocks_of(number)
        except DamageError as error:
            yield error
    leaves: list[bytes] = []
    lengths: list[int] = []
    buffer = bytearray(span)
    with files.reader(file.name) as opened:
        for block, at in enumerate(range(0, file.bytes, span)):
            view = memoryview(buffer)[: min(span, file.bytes - at)]
            opened.fill(view, at)
            leaves.append(leaf_digests(view, leaf))
            lengths.append(len(view))
            if listed and block_digests(leaves[-1], leaf, span) != [listed[block]]:
                yield DamageError(files.label(file.name), "its bytes do not match the manifest", block)
            elif listed:
                yield len(view)
    whole = b"".join(leaves)
    if not listed and manifest.version >= 4:
        blocks = bytes.fromhex("".join(block_digests(whole, leaf, span)))
        if text_digest(blocks) != file.digest:
            yield DamageError(files.label(file.name), "its bytes do not match the manifest")
        else:
            yield from lengths
    elif proved and block_digests(files.read(file.leaves)[: len(whole)], leaf, span) != listed:
        yield DamageError(files.label(file.leaves), f"it does not hold the digests of {file.name}")


def _verify_header(files: Files, manifest: Manifest, number: int) -> Iterator[DamageError]:
    """The safetensors header must say of every box what the manifest says, and of no other."""
    file = manifest.files[number]
    with files.reader(file.name) as reader:
        length = bytearray(8)
        reader.fill(memoryview(length), 0)
        size = int.from_bytes(length, "little")
        if size > file.bytes - 8:
            yield DamageError(files.label(file.name), f"its header claims {size} bytes")
            return
        text = bytearray(size)
        reader.fill(memoryview(text), 8)
    said = json.loads(text)
    said.pop("__metadata__", None)
    if manifest.version >= 4:
        yield from _compare_with_tilings(files, manifest, number, bytes(length + text), len(said))
        return
    expected = {
        entry_name(key, stored.box): {
            "dtype": array.dtype,
            "shape": list(entry_shape(stored.box, stored.panels)),
            "data_offsets": [stored.start - 8 - size, stored.stop - 8 - size],
        }
        for key, array in manifest.arrays.items()
        for stored in array.boxes
        if stored.file == number
    }
    if said != expected:
        yield DamageError(files.label(file.name), "its header and the manifest disagree")


def _compare_with_tilings(files: Files, manifest: Manifest, number: int, header: bytes, count: int) -> Iterator[DamageError]:
    """Check that a file holds the parts that its rank wrote, one after the other, and nothing else."""
    file = manifest.files[number]
    label = files.label(file.name)
    index = FileIndex.parse(manifest, number, header, label)
    found = sorted(
        (stored.start, stored.stop)
        for array in manifest.arrays.values()
        for part in manifest.tilings[array.tiling].written_by(file.rank, array.item_bytes, array.turn)
        for stored in [index.find(array, part)]
    )
    edges = [file.header, *(stop for _, stop in found)]
    if len(found) != count or [*(start for start, _ in found), file.bytes] != edges:
        yield DamageError(label, "its header and the manifest disagree")


def prune(location: str | Path, keep: int) -> list[str]:
    """Delete complete steps beyond the newest `keep` of a folder of checkpoints, or of a run. Returns their names.

    Raises CheckpointError if there are none, if a run is saving there, or keep is 0.
    """
    if keep < 1:
        raise CheckpointError("prune: keep at least 1 step")
    if open_files(location).size(MANIFEST) is not None:
        raise CheckpointError(f"{location}: this is a step; give the folder of all of them")
    in_run = not steps_newest_first(open_files(location)) and bool(step_folders(location))
    target = open_target(f"{str(location).rstrip('/')}/checkpoints" if in_run else location, coordinator=True)
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
        "files": {file.name: file.bytes for file in manifest.files},
        "roles": roles,
        "state": manifest.state,
    }
