"""Resources of this machine besides GPUs: host memory, within the container's limits, and free disk space."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import psutil


def available_memory(root: Path = Path("/")) -> int:
    """Return the available bytes of host memory: the machine's, or what this process's control groups leave, if less.

    root: the folder that holds /proc and /sys
    """
    return min([psutil.virtual_memory().available, *_left_by_groups(root)])


def _left_by_groups(root: Path) -> Iterator[int]:
    """Yield the bytes that each limited control group of this process leaves, its page cache counted as free.

    Versions 1 and 2 (Linux's admin-guide/cgroup-v1/memory.rst, cgroup-v2.rst). A group that can't be read limits nothing.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    mounted = root / "sys/fs/cgroup"
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            names = ("memory.max", "memory.current", "")
            base = mounted
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
            base = mounted / "memory"
        else:
            continue
        place = PurePosixPath(path)
        # In a container the path may be the host's, while the mount begins at the container's own group.
        for group in dict.fromkeys([place, *place.parents, PurePosixPath("/")]):
            with contextlib.suppress(OSError, ValueError):  # no such file here, or "max"
                folder = base / str(group).lstrip("/")
                limit, used = (int((folder / name).read_text()) for name in names[:2])
                yield max(0, limit - used + _page_cache(folder / "memory.stat", names[2]))


def _page_cache(stat: Path, prefix: str) -> int:
    """Return the bytes of a group's file pages that can be reclaimed; those of tmpfs can't, and don't count."""
    rows = dict(line.split() for line in stat.read_text().splitlines())
    return int(rows.get(f"{prefix}inactive_file", 0)) + int(rows.get(f"{prefix}active_file", 0))


def free_disk(folder: str | Path) -> int | None:
    """Return the free bytes of the file system of a folder, which need not exist; None for an object store, or if unknown."""
    if "://" in str(folder) and not str(folder).startswith("file://"):
        return None
    place = Path(str(folder).removeprefix("file://")).expanduser().absolute()
    for existing in (place, *place.parents):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            try:
                return shutil.disk_usage(existing).free
            except PermissionError:
                return None
    return None
