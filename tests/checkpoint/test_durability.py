"""A checkpoint gets its name when all of it is on the disk, and is announced when the name is, too."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import pytest

from meshloom.checkpoint.writing.image import write_image, write_segment
from support.checkpoint_runs import save_steps


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record what this process syncs and renames, in order."""
    noted: list[str] = []
    sync, rename = os.fsync, Path.rename

    def synced(descriptor: int) -> None:
        sync(descriptor)
        noted.append(f"sync {Path(f'/proc/self/fd/{descriptor}').readlink().name.partition('.tmp-')[0]}")

    def renamed(old: Path, new: Path) -> Path:
        noted.append(f"name {new.name}")
        return rename(old, new)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", renamed)
    return noted


def test_a_ranks_file_is_on_the_disk_when_its_writer_says_so(tmp_path: Path, events: list[str]) -> None:
    write_image(memoryview(mmap.mmap(-1, 8192))[:5000], tmp_path / "data", tmp_path / "leaves", lambda _: None)
    assert events[-1] == f"sync {tmp_path.name}"
    assert {"sync data", "sync leaves"} <= set(events[:-1])


def test_a_segment_and_its_digests_are_on_the_disk_after_one_sync_of_the_file(tmp_path: Path, events: list[str]) -> None:
    write_segment(memoryview(bytearray(5000)), tmp_path / "data", 8192, lambda _: None)
    assert events == ["sync data", f"sync {tmp_path.name}"]


def test_manifest_then_name_then_announcement_each_on_the_disk(tmp_path: Path, events: list[str]) -> None:
    save_steps(tmp_path, 1)
    expected = ["sync manifest.json", "sync step-00000001", "name step-00000001", f"sync {tmp_path.name}", "name LATEST"]
    places = [events.index(event) for event in expected]
    assert places == sorted(places), events
