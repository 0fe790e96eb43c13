"""The crash matrix in short: every kind of fault, some of the boundaries. `benchmarks/checkpoint_crash.py` has it whole."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import crash, crash_memory
from support.crash import Fault

ROOM = 64 * 2**20  # several times what the runs of one test leave behind


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """In memory where there is room for it: a killed process leaves the same files behind, and fsync costs nothing."""
    memory = Path("/dev/shm")
    room = memory.is_dir() and os.access(memory, os.W_OK) and shutil.disk_usage(memory).free >= ROOM
    with tempfile.TemporaryDirectory(dir=memory if room else None) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with steps 1 and 2 on it."""
    folder = tmp_path_factory.mktemp("base") / "checkpoints"
    crash.prepare(folder)
    return folder


def copy(base: Path, tmp_path: Path, number: int) -> Path:
    folder = tmp_path / f"run{number}"
    shutil.copytree(base, folder)
    return folder


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_kill_at_any_boundary_loses_only_steps_since_the_commit(base: Path, tmp_path: Path, mode: str) -> None:
    passed = crash.boundaries(copy(base, tmp_path, 0), mode, tmp_path)
    assert set(passed) == {("rank", 0), ("rank", 1), ("writer", 0), ("writer", 1)}
    seen: set[tuple[str, str]] = set()
    number = 0
    for (process, rank), names in passed.items():
        for index, name in enumerate(names, 1):
            if (process, name) in seen:
                continue
            seen.add((process, name))
            number += 1
            if number % (2 if mode == "sync" else 5 if process == "rank" else 1):
                continue  # half of the boundaries where training waits; where not, all of the writer's
            folder = copy(base, tmp_path, number)
            outcomes = crash.run(folder, Fault("kill", rank, process, index), mode=mode)
            crash.judge(folder, outcomes, go_on=number % 4 == 0)
            shutil.rmtree(folder)
    assert len(seen) > 10


def test_kill_while_ranks_write_one_file_loses_only_steps_since_the_commit(base: Path, tmp_path: Path) -> None:
    passed = crash.boundaries(copy(base, tmp_path, 0), "async", tmp_path, "host")
    for number, name in enumerate(["data.open.before", "data.write.after", "data.fsync.before", "data.folder.fsync.after"], 1):
        rank = number % 2
        folder = copy(base, tmp_path, number)
        fault = Fault("kill", rank, "writer", passed["writer", rank].index(name) + 1)
        crash.judge(folder, crash.run(folder, fault, mode="async", files="host"), go_on=number == 1)


@pytest.mark.parametrize("kind", ["enospc", "eio", "short"])
def test_errors_and_short_writes_are_reported_or_harmless(base: Path, tmp_path: Path, kind: str) -> None:
    passed = crash.boundaries(copy(base, tmp_path, 0), "sync", tmp_path)
    seen: set[str] = set()
    for index, name in enumerate(passed["rank", 0], 1):
        if name in seen:
            continue
        seen.add(name)
        if len(seen) % 4:
            continue
        folder = copy(base, tmp_path, index)
        outcomes = crash.run(folder, Fault(kind, 0, "rank", index), mode="sync")
        crash.judge(folder, outcomes, go_on=index % 4 == 0)
        shutil.rmtree(folder)


@pytest.mark.parametrize(("kind", "files"), [("enospc", "rank"), ("short", "rank"), ("short", "host")])
def test_errors_in_a_writer_process(base: Path, tmp_path: Path, kind: str, files: str) -> None:
    for index in (1, 4, 9):
        folder = copy(base, tmp_path, index)
        outcomes = crash.run(folder, Fault(kind, 1, "writer", index), mode="async", files=files)
        crash.judge(folder, outcomes)


RANK_FILES = ("rank-00000.safetensors", "rank-00001.safetensors", "rank-00000.leaves")


@pytest.mark.parametrize(("kind", "files"), [("rank", RANK_FILES), ("host", ("host-00000.segments",))])
def test_damage_to_any_region_of_any_file_is_refused_by_name(
    base: Path, tmp_path: Path, kind: str, files: tuple[str, ...]
) -> None:
    finished = copy(base, tmp_path, 0)
    crash.run(finished, files=kind)
    damages = [crash.lost_rename(), *([crash.swap()] if kind == "rank" else [])]
    for file in ("manifest.json", *files):
        damages += [crash.remove(file), crash.stale(file)] if file != "manifest.json" else [crash.remove(file)]
        damages += [make(file, position) for make in (crash.flip, crash.cut, crash.zero_tail) for position in (0, 0.3, 0.999)]
    for number, damage in enumerate(damages, 1):
        folder = copy(finished, tmp_path, number)
        crash.judge_damage(folder, damage)


def test_two_runs_on_one_folder(base: Path, tmp_path: Path) -> None:
    crash.two_runs(copy(base, tmp_path, 1), locked=True)
    for number in range(2, 4):
        crash.two_runs(copy(base, tmp_path, number), locked=False)


def test_dead_trainers_keepers_and_nodes_lose_no_kept_snapshot(tmp_path: Path) -> None:
    passed = crash_memory.boundaries(tmp_path / "log" / "checkpoints", tmp_path)
    assert min(len(names) for names in passed.values()) >= 15
    faults = list(crash_memory.all_faults(passed))
    for number, fault in enumerate(faults[5 :: len(faults) // 4]):
        folder = tmp_path / f"run{number}" / "checkpoints"
        kept = crash_memory.run(folder, fault)
        try:
            crash_memory.judge(folder, kept)
        finally:
            crash_memory.end_keepers(folder)
