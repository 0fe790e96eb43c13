"""What this machine has besides its GPUs: host memory, within the limits of the container, and room in a folder."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import psutil


def available_memory(root: Path = Path("/")) -> int:
    """Bytes of host memory that can be had: the machine's, or what every control group above this process leaves, if less.

    root: where /proc and /sys are.
    """
    return min([psutil.virtual_memory().available, *_left_by_groups(root)])


def _left_by_groups(root: Path) -> Iterator[int]:
    """What each limited control group of this process leaves; its page cache can be taken back. Versions 1 and 2 (Linux's
    admin-guide/cgroup-v1/memory.rst, cgroup-v2.rst). One that can't be read limits nothing.
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
        # In a container the path may be the host's, while what is mounted begins at the container's own group.
        for group in dict.fromkeys([place, *place.parents, PurePosixPath("/")]):
            with contextlib.suppress(OSError, ValueError):  # no such file here, or "max"
                folder = base / str(group).lstrip("/")
                limit, used = (int((folder / name).read_text()) for name in names[:2])
                yield max(0, limit - used + _page_cache(folder / "memory.stat", names[2]))


def _page_cache(stat: Path, prefix: str) -> int:
    """Bytes of files that a group has in memory and that need not stay there; not those of tmpfs, which must."""
    rows = dict(line.split() for line in stat.read_text().splitlines())
    return int(rows.get(f"{prefix}inactive_file", 0)) + int(rows.get(f"{prefix}active_file", 0))


def free_disk(folder: str | Path) -> int | None:
    """Free bytes of the file system that a folder is on, or would be; None for an object store, or where nobody can tell."""
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
