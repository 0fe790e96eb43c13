"""The cost of reading a checkpoint beside the bytes that are wanted, and reads from a disk that fails."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from meshloom.checkpoint.checkpointer import Checkpointer
from meshloom.checkpoint.config import CheckpointConfig
from meshloom.checkpoint.control import Control
from meshloom.checkpoint.errors import CheckpointError, DamageError
from meshloom.checkpoint.files import LocalFiles
from meshloom.checkpoint.folder import open_step
from meshloom.checkpoint.reading import reader as reader_module
from meshloom.checkpoint.reading import shared_reader
from meshloom.checkpoint.reading.reader import Reader
from meshloom.checkpoint.reading.shared_reader import SharedReader, unpacked
from meshloom.checkpoint.restore import restore
from meshloom.launch.checkpoint import main
from meshloom.parallel.box import Box
from meshloom.parallel.fragment import Fragment
from support.checkpoint_worlds import fragments, holds, make_arrays, together
from support.ranks import run_ranks


def save(folder: Path, ranks: list[list[Fragment]], *steps: int) -> None:
    def body(control: Control) -> None:
        checkpointer = Checkpointer(folder, control, CheckpointConfig(mode="sync", timeout=60, keep=0))
        for step in steps:
            checkpointer.save(step, ranks[control.rank], {"step": step})
        checkpointer.finish()

    together(len(ranks), body)


class Counting(LocalFiles):
    """A folder that counts how many of its files are open at once."""

    now = most = 0
    lock = threading.Lock()

    @contextlib.contextmanager
    def reader(self, name: str) -> Iterator[Any]:
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)
        with super().reader(name) as opened:
            yield opened
        with self.lock:
            self.now -= 1


def test_however_many_ranks_saved_few_files_are_open_at_once(tmp_path: Path) -> None:
    world = 24
    whole = torch.randn(world, 50)
    rows = [Box((rank, 0), (1, 50)) for rank in range(world)]
    save(tmp_path, [[Fragment("w", "weight", (world, 50), box, whole[box.slices()].clone())] for box in rows], 1)
    files = Counting(tmp_path / "step-00000001")
    manifest = open_step(files)
    assert len(manifest.files) == world
    (found,) = Reader(files, manifest).read([(manifest.arrays["weight/w"], Box.whole((world, 50)))])
    assert torch.equal(torch.from_numpy(found).view(torch.float32), whole)
    assert files.most <= files.parallel_reads


def test_only_the_digests_of_what_is_read_are_read_and_held(tmp_path: Path) -> None:
    count = 140 * 2**18  # 140 MiB, so that the digests are 560 KiB
    whole = torch.arange(count, dtype=torch.int32)
    save(tmp_path, [[Fragment("w", "weight", (count,), Box.whole((count,)), whole)]], 1)
    box = Box((70 * 2**18,), (1000,))
    part = torch.zeros(1000, dtype=torch.int32)
    report = restore(tmp_path, [Fragment("w", "weight", (count,), box, part)], Control.alone())
    assert torch.equal(part, whole[box.slices()])
    assert report.bytes_read <= 2 * 2**18 + 3 * 4096  # those of the header's 64 MiB, and of the 64 MiB that the part is in


def test_one_reader_for_many_arrays_does_not_collect_digests(tmp_path: Path) -> None:
    arrays = make_arrays(0, large=True)
    save(tmp_path, fragments(arrays, 5, 1), 1)
    files = LocalFiles(tmp_path / "step-00000001")
    manifest = open_step(files)
    reader = Reader(files, manifest)
    for array in manifest.arrays.values():
        reader.read([(array, Box.whole(array.shape))])
    assert sum(map(len, reader._proved.values())) <= 8 * 2**18
    once = reader.traffic.read
    reader.read([(manifest.arrays["weight/norm.weight"], Box.whole((24,)))])
    assert reader.traffic.read - once <= 5 * 2 * 4096, "the digests are still there"


@pytest.mark.parametrize("name", ["manifest.json", "rank-00000.leaves", "rank-00000.safetensors", "LATEST"])
def test_unreadable_file_counts_as_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path, fragments(make_arrays(), 1, 0), 1, 2)
    bad = tmp_path / name if name == "LATEST" else tmp_path / "step-00000002" / name
    open_file, read_bytes = os.open, Path.read_bytes

    def refuse(path: Any, *rest: Any, **named: Any) -> int:
        if Path(path) == bad:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return open_file(path, *rest, **named)

    def refuse_bytes(path: Path) -> bytes:
        if path == bad:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return read_bytes(path)

    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr(Path, "read_bytes", refuse_bytes)
    ranks = fragments(make_arrays(), 1, 0, blank=True)
    if name != "LATEST":
        with pytest.raises(DamageError, match=name):
            restore(tmp_path / "step-00000002", ranks[0], Control.alone())
        assert main(["verify", str(tmp_path / "step-00000002")]) == 1
        assert f"DAMAGED {bad}" in capsys.readouterr().out
    assert restore(tmp_path, ranks[0], Control.alone()).step == (2 if name == "LATEST" else 1)
    assert holds(ranks, make_arrays())


def _failing_in_group(rank: int, world: int, folder: str, suffix: str) -> int:
    if rank == 1:  # one node has lost its sight of some files
        open_file = os.open

        def refuse(path: Any, *rest: Any, **named: Any) -> int:
            if str(path).endswith(suffix) and "00000002" in str(path):
                raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
            return open_file(path, *rest, **named)

        os.open = refuse  # type: ignore[assignment]
    results: list[weakref.ref[Any]] = []
    allocate = reader_module.empty_results

    def allocate_alone(shapes: Any) -> list[Any]:
        assert not any(result() is not None for result in results), "a step's values stay while the next one is tried"
        found = allocate(shapes)
        results.extend(map(weakref.ref, found))
        return found

    reader_module.empty_results = allocate_alone
    gc.disable()
    ranks = fragments(make_arrays(), world, 4, blank=True)
    control = Control(rank, world, dist.FileStore(f"{folder}/store", world))
    report = restore(folder, ranks[rank], control, timeout=60, group=dist.group.WORLD)
    assert suffix in report.skipped[0] and "Input/output error" in report.skipped[0], report.skipped
    return report.step


def test_where_the_coordinator_can_not_look_the_others_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, fragments(make_arrays(), 2, 9), 1)
    ranks = fragments(make_arrays(), 2, 4, blank=True)

    def blind(path: Path) -> Any:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    def body(control: Control) -> str:
        with pytest.raises((CheckpointError, OSError)) as error:
            restore(tmp_path, ranks[control.rank], control, timeout=60)
        return str(error.value)

    monkeypatch.setattr(Path, "iterdir", blind)
    said = together(2, body)
    assert all("Permission denied" in text for text in said), said


def test_messages_about_ranks_needs_are_small(tmp_path: Path) -> None:
    count = 40 * 2**18
    files = LocalFiles(tmp_path / "step-00000001")
    save(tmp_path, [[Fragment("w", "weight", (count,), Box.whole((count,)), torch.zeros(count))]], 1)
    manifest = open_step(files)
    (items,) = Reader(files, manifest).items([(manifest.arrays["weight/w"], Box((5,), (count - 10,)))])
    needs = SharedReader(files, manifest, None)._needs(items)  # type: ignore[arg-type]
    assert len(needs[0]) < 200
    leaves = unpacked(needs[0], -(-manifest.files[0].bytes // 4096))
    assert leaves.sum() == 10240 and not leaves[0]


def _windows_of_a_header(rank: int, world: int, folder: str) -> int:
    shared_reader.WINDOW_BYTES, dealt = 2**20, 0
    deal = shared_reader.deal

    def counted(wanted: Any) -> Any:
        nonlocal dealt
        dealt += 1
        return deal(wanted)

    shared_reader.deal = counted
    files = LocalFiles(Path(folder) / "step-00000001")
    manifest = open_step(files)
    assert dist.group.WORLD is not None
    SharedReader(files, manifest, dist.group.WORLD).load_indexes([(manifest.arrays["weight/w"], Box((0,), (4,)))])
    return dealt


def test_of_a_file_whose_header_is_read_the_rest_is_not_walked(tmp_path: Path) -> None:
    count = 2**20  # four windows
    save(tmp_path, [[Fragment("w", "weight", (count,), Box.whole((count,)), torch.zeros(count))]], 1)
    assert run_ranks(2, _windows_of_a_header, str(tmp_path)) == [1, 1]


@pytest.mark.parametrize("suffix", [".leaves", "rank-00001.safetensors"])
def test_rank_with_a_failing_disk_does_not_hang_the_others(tmp_path: Path, suffix: str) -> None:
    save(tmp_path, fragments(make_arrays(), 2, 9), 1, 2)
    assert run_ranks(3, _failing_in_group, str(tmp_path), suffix) == [1, 1, 1]


def test_verify_names_all_that_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path, fragments(make_arrays(0, large=True), 2, 5), 1)
    for name in ("rank-00000.safetensors", "rank-00001.safetensors"):
        path = tmp_path / "step-00000001" / name
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    (tmp_path / "step-00000001/rank-00000.leaves").unlink()
    assert main(["verify", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert all(name in out for name in ("rank-00000.leaves", "rank-00000.safetensors", "rank-00001.safetensors"))


def test_small_reads_are_all_announced_before_the_first_wait(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []

    class Watched(LocalFiles):
        @contextlib.contextmanager
        def reader(self, name: str) -> Iterator[Any]:
            with super().reader(name) as opened:
                yield Watcher(opened) if name.endswith(".safetensors") else opened

    class Watcher:
        def __init__(self, opened: Any) -> None:
            self.opened = opened

        def expect(self, offset: int, length: int) -> None:
            seen.append(("expect", offset, length))
            self.opened.expect(offset, length)

        def fill(self, target: memoryview, offset: int) -> None:
            seen.append(("fill", offset, len(target)))
            self.opened.fill(target, offset)

    values = torch.arange(8192).double()  # 16 leaves of 4 KiB
    save(tmp_path, [[Fragment("w", "weight", (8192,), Box.whole((8192,)), values)]], 1)
    files = Watched(tmp_path / "step-00000001")
    manifest = open_step(files)
    array = manifest.arrays["weight/w"]
    begin = manifest.files[0].header
    assert begin == 4096  # after a leaf of header, which is read as well
    parts = Reader(files, manifest).read([(array, Box((first,), (600,))) for first in (0, 4096)])
    assert [part.view(np.float64)[0] for part in parts] == [0.0, 4096.0]
    spans = [(begin, 8192), (begin + 8 * 4096, 8192)]
    header = ("fill", 0, 4096)
    assert seen == [header, *(("expect", *span) for span in spans), *(("fill", *span) for span in spans)]
    del seen[:]
    Reader(files, manifest).read([(array, Box((0,), (8192,)))])
    assert seen == [header, ("fill", begin, 65536)], "one long read is told of by itself"
