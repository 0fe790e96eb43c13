"""Watch folders of launchers that were killed are removed by the next; those in use stay."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from meshloom.launch.watch.watch_folder import PREFIX, YOUNG_SECONDS, WatchFolder


def left_by_a_killed_process(parent: Path) -> Path:
    """A folder whose launcher, a child of this process, was killed."""
    child = os.fork()
    if child == 0:
        WatchFolder(parent)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    (folder,) = parent.glob(f"{PREFIX}*")
    return folder


def test_a_killed_launchers_folder_goes_and_one_in_use_stays(tmp_path: Path) -> None:
    left = left_by_a_killed_process(tmp_path)
    (left / "attempt-0").mkdir()
    (left / "attempt-0" / "rank-0.beat").write_bytes(b"x")
    first = WatchFolder(tmp_path)
    second = WatchFolder(tmp_path)
    assert not left.exists() and first.path.exists() and second.path.exists()
    first.remove()
    second.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_a_lock_goes_once_it_is_old(tmp_path: Path) -> None:
    old, young = tmp_path / f"{PREFIX}old", tmp_path / f"{PREFIX}young"
    for folder in (old, young):
        folder.mkdir()
    before = time.time() - 2 * YOUNG_SECONDS
    os.utime(old, (before, before))
    (tmp_path / "another").mkdir()
    WatchFolder(tmp_path).remove()
    assert sorted(each.name for each in tmp_path.iterdir()) == ["another", young.name]
