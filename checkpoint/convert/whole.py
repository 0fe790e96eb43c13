"""A folder for another program appears under its name when it is complete, and on the disk, or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from ..errors import CheckpointError
from ..writing.disk import sync_folder


def write_whole(folder: Path, write: Callable[[Path], None]) -> Path:
    """Have `write` fill a folder under another name, then give it its own. Returns it.

    Raises CheckpointError if there is one of that name; what `write` raises leaves nothing behind.
    """
    if folder.exists():
        raise CheckpointError(f"{folder} exists already; give a new folder")
    fresh = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    try:
        write(fresh)
        for path in [*fresh.rglob("*"), fresh]:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        fresh.rename(folder)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    sync_folder(folder.parent, "export.folder")
    return folder
