"""Resources of this machine besides GPUs: host memory, within the container's limits, and free disk space."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import psutil

from ..checkpoint.files import is_remote, local_path


def available_memory(root: Path = Path("/")) -> int:
    """Return the available bytes of host memory: the machine's, or what this process's control groups leave, if less.

    root: the folder that holds /proc and /sys
    """
    left = [max(0, group.memory - group.used + group.reclaimable) for group in _limited_groups(root)]
    return min([psutil.virtual_memory().available, *left])


def memory_limit(root: Path = Path("/")) -> int:
    """Return the most bytes of host memory and swap that processes can ever hold here: the machine's, or a control group's.

    What is free at the moment does not change it. root: as of `available_memory`
    """
    swap = psutil.swap_memory().total
    return min([psutil.virtual_memory().total + swap, *(group.with_swap(swap) for group in _limited_groups(root))])


@dataclass(frozen=True)
class _Group:
    """A control group with a limit of memory, all in bytes.

    reclaimable  the part of `used` that the kernel gives back on demand
    swap         limit of swap by itself; None: the group has none
    together     limit of memory and swap together (version 1); None: the group has none
    """

    memory: int
    used: int
    reclaimable: int
    swap: int | None
    together: int | None

    def with_swap(self, swap: int) -> int:
        """Return the most bytes of memory and swap. swap: of the machine."""
        both = self.memory + (swap if self.swap is None else min(self.swap, swap))
        return both if self.together is None else min(both, self.together)


def _limited_groups(root: Path) -> Iterator[_Group]:
    """Yield each control group of this process that limits memory.

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
            names = ("memory.max", "memory.current", "memory.swap.max", "")
            base, prefix = mounted, ""
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "", "memory.memsw.limit_in_bytes")
            base, prefix = mounted / "memory", "total_"
        else:
            continue
        place = PurePosixPath(path)
        # In a container the path may be the host's, while the mount begins at the container's own group.
        for group in dict.fromkeys([place, *place.parents, PurePosixPath("/")]):
            with contextlib.suppress(OSError, ValueError):  # no such file here, or "max"
                folder = base / str(group).lstrip("/")
                limit, used = (int((folder / name).read_text()) for name in names[:2])
                swap, together = (_number(folder / name) if name else None for name in names[2:])
                yield _Group(limit, used, _reclaimable(folder / "memory.stat", prefix), swap, together)


def _number(path: Path) -> int | None:
    """Read a number; None where there is no such file, or no number in it."""
    with contextlib.suppress(OSError, ValueError):
        return int(path.read_text())
    return None


def _reclaimable(stat: Path, prefix: str) -> int:
    """Return the bytes of a group that can be reclaimed: file pages except tmpfs's, and (version 2) slabs such as dentries."""
    rows = dict(line.split() for line in stat.read_text().splitlines())
    return sum(int(rows.get(f"{prefix}{name}", 0)) for name in ("inactive_file", "active_file", "slab_reclaimable"))


def free_disk(folder: str | Path) -> int | None:
    """Return the free bytes of the file system of a folder, which need not exist; None for an object store, or if unknown."""
    if is_remote(str(folder)):
        return None
    place = local_path(folder).absolute()
    for existing in (place, *place.parents):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            try:
                return shutil.disk_usage(existing).free
            except PermissionError:
                return None
    return None
