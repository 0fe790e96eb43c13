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

from meshloom.checkpoint import files as files_module
from meshloom.checkpoint.checkpointer import Checkpointer
from meshloom.checkpoint.config import CheckpointConfig
from meshloom.checkpoint.control import Control
from meshloom.checkpoint.errors import CheckpointError, DamageError, UnreadableError
from meshloom.checkpoint.files import LocalFiles
from meshloom.checkpoint.folder import find_latest, open_step
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


@pytest.mark.parametrize("name", ["manifest.json", "rank-00000.leaves", "rank-00000.safetensors", "LATEST", "run.json"])
def test_a_file_that_can_not_be_read_sets_no_run_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path, fragments(make_arrays(), 1, 0), 1, 2)
    (tmp_path / "run.json").write_text('{"id": "unnamed", "parent": null}')
    step = tmp_path / "step-00000002"
    bad = tmp_path / name if name in ("LATEST", "run.json") else step / name
    failures, why = 99, errno.EIO
    open_file, read_bytes = os.open, Path.read_bytes

    def fail(path: Any) -> None:
        nonlocal failures
        if Path(path) == bad and failures:
            failures -= 1
            raise OSError(why, os.strerror(why), str(path))

    def refuse(path: Any, *rest: Any, **named: Any) -> int:
        fail(path)
        return open_file(path, *rest, **named)

    def refuse_bytes(path: Path) -> bytes:
        fail(path)
        return read_bytes(path)

    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr(Path, "read_bytes", refuse_bytes)
    monkeypatch.setattr(files_module, "RETRY_PAUSES", (0.0, 0.0))
    ranks = fragments(make_arrays(), 1, 0, blank=True)
    for place in (tmp_path, step) if bad.parent == step else (tmp_path,):
        with pytest.raises(CheckpointError, match=f"{bad}: (opening|reading) it failed: .*Input/output error") as caught:
            restore(place, ranks[0], Control.alone())
        assert not isinstance(caught.value, DamageError)
        assert holds(ranks, make_arrays()) is False
    if bad.parent == step:
        assert main(["verify", str(step)]) == 1
        assert f"UNREADABLE {bad}" in capsys.readouterr().out
    if name in ("manifest.json", "LATEST"):
        with pytest.raises(UnreadableError):
            find_latest(tmp_path)
    why, failures = errno.EACCES, 1  # no permission: a second try is of no use
    with pytest.raises(CheckpointError, match="Permission denied"):
        restore(tmp_path, ranks[0], Control.alone())
    assert failures == 0
    why, failures = errno.ETIMEDOUT, 2  # it passes
    assert restore(tmp_path, ranks[0], Control.alone()).step == 2
    assert failures == 0 and holds(ranks, make_arrays())
    if bad.parent == step and name != "manifest.json":
        why, failures = errno.EBADMSG, 1  # the file system itself knows that it is not what was written
        assert restore(tmp_path, ranks[0], Control.alone()).step == 1


def test_a_read_that_fails_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").write_bytes(b"new")
    preadv, descriptors = os.preadv, list[int]()

    def stale(descriptor: int, *rest: Any) -> int:
        descriptors.append(os.fstat(descriptor).st_ino)
        if len(descriptors) == 1:
            (tmp_path / "data").unlink()
            (tmp_path / "data").write_bytes(b"NEW")
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return preadv(descriptor, *rest)

    monkeypatch.setattr(os, "preadv", stale)
    monkeypatch.setattr(files_module, "RETRY_PAUSES", (0.0,))
    target = bytearray(3)
    with LocalFiles(tmp_path).reader("data") as reader:
        reader.fill(memoryview(target), 0)
        with pytest.raises(DamageError, match="the file ends at byte 3"):
            reader.fill(memoryview(target), 1)
    assert descriptors[1] == (tmp_path / "data").stat().st_ino


def _failing_in_group(rank: int, world: int, folder: str, suffix: str, why: int) -> str:
    files_module.RETRY_PAUSES = ()
    if rank == 1:  # one node has lost its sight of some files
        open_file = os.open

        def refuse(path: Any, *rest: Any, **named: Any) -> int:
            if str(path).endswith(suffix) and "00000002" in str(path):
                raise OSError(why, os.strerror(why), str(path))
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
    try:
        report = restore(folder, ranks[rank], control, timeout=60, group=dist.group.WORLD)
    except CheckpointError as error:
        return str(error)
    return f"step {report.step}, not {report.skipped[0]}"


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


@pytest.mark.parametrize(("suffix", "why"), [(".leaves", errno.EIO), ("rank-00001.safetensors", errno.EBADMSG)])
def test_rank_with_a_failing_disk_does_not_hang_the_others(tmp_path: Path, suffix: str, why: int) -> None:
    """It ends the restore on all ranks, or is passed over by all where the disk knows that the data are bad."""
    save(tmp_path, fragments(make_arrays(), 2, 9), 1, 2)
    (said,) = set(run_ranks(3, _failing_in_group, str(tmp_path), suffix, why))
    assert suffix in said and os.strerror(why) in said
    assert ("no older step takes its place" in said, said.startswith("step 1, ")) == (why == errno.EIO, why == errno.EBADMSG)


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
