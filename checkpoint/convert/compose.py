"""Make a checkpoint out of arrays that come from elsewhere, one at a time: all imports end here."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...parallel.box import Box
from ..digest import LEAF_BYTES, leaf_digests, seal
from ..dtypes import bytes_of, in_panels, name_of
from ..errors import CheckpointError
from ..files import is_remote, local_path, open_files
from ..folder import list_steps, step_name
from ..manifest import Manifest, state_fault
from ..planning.description import Declaration, Description
from ..planning.plan import SavePlan, lay_out
from ..saving.commit import new_token, open_target
from ..stored_file import StoredFile, data_file_names
from ..writing.disk import sync_folder, write_small
from .progress import tell

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """An array, or a box of it, that can be had when its turn comes; `read` must give `dtype` and the box's shape.

    shape  of the whole array
    box    the part of it that this is; None: all. All parts of an array must be among the sources
    """

    name: str
    role: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]
    splits: tuple[int, ...] = ()
    box: Box | None = None

    @property
    def region(self) -> Box:
        """The box of the array that this is."""
        return Box.whole(self.shape) if self.box is None else self.box

    @property
    def key(self) -> str:
        """Name of the array in a checkpoint."""
        return f"{self.role}/{self.name}"


def compose(
    folder: str | Path,
    step: int,
    sources: Sequence[Source],
    state: dict[str, Any],
    beside: Mapping[str, bytes] | None = None,
    *,
    overwrite: bool = False,
) -> Path:
    """Write and commit a step with these arrays. Host memory holds one source at a time. Returns the step's folder.

    beside: name → contents of further files in the step's folder
    overwrite: replace this step if an earlier import has made it, and delete what it replaces; else that is refused

    Arrays without elements have nothing to store and are left out. Raises CheckpointError for a state that is not plain
    JSON, a type that can't be stored, two arrays of one name, or a folder that is in use, that a run has saved into, or that
    has this step already.
    """
    sources = [source for source in sources if 0 not in source.shape]
    if is_remote(folder):
        raise CheckpointError(f"{folder}: imports are written to a mounted folder; copy it to the object store afterwards")
    fault = state_fault(state)
    if fault is not None:
        raise CheckpointError(fault)
    declarations = [_declared(source) for source in sources]
    counted = Counter((source.key, source.region) for source in sources)
    twice = next((key for (key, _), count in counted.items() if count > 1), None)
    if twice is not None:
        raise CheckpointError(f"two arrays are called {twice}")
    plan = SavePlan.of(Description.of(declarations, 0))
    layout = lay_out(declarations, plan.pieces(0, declarations))
    token = new_token()
    _refuse_mixing(folder, step, overwrite)  # before a run that saves there is in the way, and before anything is cleared
    target = open_target(folder, coordinator=True)
    try:
        _refuse_mixing(folder, step, overwrite)  # again with the folder locked, so that two imports don't both find it free
        target.begin(step, token)
        try:
            place = Path(target.place(step, token))
            name, leaves = data_file_names(0, target.suffix(token))
            output = _Output(place / name)
            try:
                output.write(memoryview(layout.header))
                current, values, done = -1, torch.empty(0), len(layout.header)
                for placed in layout.placed:
                    if placed.source != current:
                        current, values = placed.source, _checked(sources[placed.source])
                    part = bytes_of(in_panels(values[placed.box.slices(sources[current].region.offsets)], placed.panels))
                    output.write(part)
                    done += part.nbytes
                    tell(done, layout.bytes)
                output.finish()
            finally:
                output.close()
            digests, sealed = seal(bytes(output.digests))
            write_small(place / leaves, digests, "leaves")
            for extra, contents in (beside or {}).items():
                write_small(place / extra, contents, "beside")
            sync_folder(place, "data.folder")
            written = StoredFile(name, layout.bytes, leaves, sealed, 0, len(layout.header))
            files = [written] if layout.bytes else []
            manifest = Manifest(step, 1, state, files, plan.arrays, commit=target.next_commit(), tilings=plan.tilings)
            target.commit(manifest, manifest.encode(), token)
        except BaseException:
            target.discard(step, token)
            raise
        try:
            target.prune(0)
        except OSError as error:
            log.warning("%s: what was replaced could not be deleted: %s", folder, error)
    finally:
        target.close()
    return local_path(folder) / step_name(step)


def _refuse_mixing(folder: str | Path, step: int, overwrite: bool) -> None:
    """Raise CheckpointError if a folder holds a run's checkpoints or, unless told to overwrite, this very step."""
    listing = list_steps(open_files(folder))
    listing.refuse_unreadable()
    if listing.run is not None:
        raise CheckpointError(f"{folder} holds a run's checkpoints, which an import must not mix with; give another folder")
    if not overwrite and (local_path(folder) / step_name(step)).exists():
        name = step_name(step)
        raise CheckpointError(f"{folder} has {name} already; give another folder, or --overwrite to replace that step")


def _declared(source: Source) -> Declaration:
    try:
        dtype = name_of(source.dtype)
    except ValueError as error:
        raise CheckpointError(f"{source.key}: {error}") from error
    return Declaration(source.name, source.role, dtype, source.shape, source.splits, source.region)


def _checked(source: Source) -> torch.Tensor:
    values = source.read().detach().cpu()
    if tuple(values.shape) != source.region.shape or values.dtype != source.dtype:
        found = f"{values.dtype}{list(values.shape)}"
        expected = f"{source.dtype}{list(source.region.shape)}"
        raise CheckpointError(f"{source.key}: expected {expected}, the source holds {found}")
    return values


class _Output:
    """A file that is hashed leaf by leaf while it is written."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        self._pending = bytearray()
        self.digests = bytearray()

    def write(self, data: memoryview) -> None:
        """Append bytes."""
        rest = data
        if self._pending:
            missing = LEAF_BYTES - len(self._pending)
            self._pending += rest[:missing]
            rest = rest[missing:]
            if len(self._pending) < LEAF_BYTES:
                return
            self._flush(memoryview(bytes(self._pending)))
            self._pending.clear()
        whole = len(rest) // LEAF_BYTES * LEAF_BYTES
        self._flush(rest[:whole])
        self._pending += rest[whole:]

    def finish(self) -> None:
        """Write the last, shorter leaf and make everything durable."""
        self._flush(memoryview(bytes(self._pending)))
        self._pending.clear()
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def _flush(self, data: memoryview) -> None:
        self.digests += leaf_digests(data)
        while data:
            data = data[os.write(self._descriptor, data) :]
