"""Requests of a reader: how many, of which bytes, how many at once; and damage that is met on the way."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from fsspec.asyn import AsyncFileSystem
from fsspec.implementations.dirfs import DirFileSystem

from meshloom.checkpoint.checkpointer import Checkpointer
from meshloom.checkpoint.config import CheckpointConfig
from meshloom.checkpoint.control import Control
from meshloom.checkpoint.errors import DamageError
from meshloom.checkpoint.files import LocalFiles, RemoteFiles
from meshloom.checkpoint.folder import open_step
from meshloom.checkpoint.manifest import Manifest
from meshloom.checkpoint.reading import items as items_module
from meshloom.checkpoint.reading import reader as reader_module
from meshloom.checkpoint.reading.reader import Reader
from meshloom.parallel.box import Box
from meshloom.parallel.fragment import Fragment

MIB = 2**20
SHAPE = (1024, 1024)  # int32, so 4 MiB, in panels of some columns each
NAME = "rank-00000.safetensors"


def save(folder: Path, *shapes: tuple[int, ...], files: str = "rank") -> tuple[Path, list[torch.Tensor]]:
    """Save arrays w0, w1, … of int32 by one rank. Returns the step's folder, and the arrays."""
    generator = torch.Generator().manual_seed(7)
    arrays = [torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32, generator=generator) for shape in shapes]
    held = [Fragment(f"w{i}", "weight", tuple(a.shape), Box.whole(a.shape), a) for i, a in enumerate(arrays)]
    checkpointer = Checkpointer(folder, Control.alone(), CheckpointConfig(mode="sync", files=files, timeout=60))
    checkpointer.save(1, held, {})
    checkpointer.finish()
    return folder / "step-00000001", arrays


class Watched(LocalFiles):
    """A folder that notes the ranges that are read of its data files, and the threads that read them."""

    def __init__(self, path: Path, parallel_reads: int = 1, merge_gap: int = 0, meet: threading.Barrier | None = None) -> None:
        super().__init__(path)
        self.parallel_reads, self.merge_gap, self.meet = parallel_reads, merge_gap, meet
        self.ranges: list[tuple[int, int]] = []
        self.threads: set[int] = set()

    @contextlib.contextmanager
    def reader(self, name: str) -> Iterator[Any]:
        with super().reader(name) as opened:
            yield _Watcher(self, opened) if name == NAME else opened


class _Watcher:
    def __init__(self, files: Watched, opened: Any) -> None:
        self.files, self.expect, self.opened = files, opened.expect, opened

    def fill(self, target: memoryview, offset: int) -> None:
        self.files.ranges.append((offset, len(target)))
        self.files.threads.add(threading.get_ident())
        if self.files.meet is not None and offset:  # the header is read alone
            self.files.meet.wait()
        self.opened.fill(target, offset)


def read(files: LocalFiles, box: Box, key: str = "weight/w0") -> tuple[torch.Tensor, Reader]:
    manifest = open_step(files)
    reader = Reader(files, manifest)
    (found,) = reader.read([(manifest.arrays[key], box)])
    return torch.from_numpy(found.view(np.int32)), reader


@pytest.fixture
def small_spans(monkeypatch: pytest.MonkeyPatch) -> int:
    """Read at most 256 KiB at once, so that small files have many spans."""
    for module in (items_module, reader_module):
        monkeypatch.setattr(module, "BATCH_BYTES", MIB // 4)
    return MIB // 4


def panels_of(manifest: Manifest, files: LocalFiles) -> int:
    (stored,) = Reader(files, manifest).boxes(manifest.arrays["weight/w0"])
    return stored.panels


def test_arrays_are_read_whole_by_few_large_requests(tmp_path: Path) -> None:
    step, arrays = save(tmp_path, SHAPE, *[(256, 256)] * 40)
    files = Watched(step)
    manifest = open_step(files)
    assert panels_of(manifest, files) > 1
    del files.ranges[:]
    reader = Reader(files, manifest)
    wanted = [(array, Box.whole(array.shape)) for array in manifest.arrays.values()]
    assert all(len(items) == 1 for items in reader.items(wanted)), "all panels of an array belong to one read"
    found = dict(zip(manifest.arrays, reader.read(wanted), strict=True))
    assert all(torch.equal(torch.from_numpy(found[f"weight/w{i}"].view(np.int32)), a) for i, a in enumerate(arrays))
    header = manifest.files[0].header
    assert files.ranges[0] == (0, header)
    sizes = [size for _, size in files.ranges[1:]]  # 14 MiB, which is one span
    assert len(sizes) == 1 and 14 * MIB <= sizes[0] <= 14 * MIB + 4096


def test_partial_reads_ask_for_the_leaves_they_need_alone(tmp_path: Path) -> None:
    step, (whole,) = save(tmp_path, SHAPE)
    files = Watched(step)
    panels = panels_of(open_step(files), files)
    panel_bytes = 4 * MIB // panels
    header = open_step(files).files[0].header
    for box, requests in ((Box((0, 0), (1024, 1024 // panels)), 1), (Box((256, 0), (128, 1024)), panels)):
        del files.ranges[:]
        values, reader = read(files, box)
        assert torch.equal(values, whole[box.slices()])
        assert len(files.ranges) == 1 + requests  # the header first
        assert sum(size for _, size in files.ranges[1:]) <= box.numel * 4 + 4096 * requests
        assert reader.traffic.wanted == box.numel * 4
        assert reader.traffic.read <= sum(size for _, size in files.ranges) + 4 * (header // 4096 + 4 * MIB // 4096 + 8) * 16
    assert files.ranges[1] == (header + panel_bytes // 4, panel_bytes // 8), "an eighth of the first panel, from a quarter on"


def test_where_requests_cost_much_near_needs_are_one_request(tmp_path: Path) -> None:
    step, (whole,) = save(tmp_path, SHAPE)
    panels = panels_of(open_step(LocalFiles(step)), LocalFiles(step))
    box = Box((256, 0), (128, 1024))
    gap = 4 * MIB // panels * 7 // 8
    for merge_gap, requests in ((gap + 1, 1), (gap, panels)):
        files = Watched(step, merge_gap=merge_gap)
        values, _ = read(files, box)
        assert torch.equal(values, whole[box.slices()])
        assert len(files.ranges) == 1 + requests
    far = [Box((at,), (100,)) for at in (0, MIB, 2 * MIB)]
    step, (flat,) = save(tmp_path / "far", (3 * MIB,))
    files = Watched(step, merge_gap=2**16)
    manifest = open_step(files)
    reader = Reader(files, manifest)
    found = reader.read([(manifest.arrays["weight/w0"], each) for each in far])
    assert all(torch.equal(torch.from_numpy(f.view(np.int32)), flat[b.slices()]) for f, b in zip(found, far, strict=True))
    assert [size for _, size in files.ranges[1:]] == [4096] * 3


def test_several_requests_are_in_flight_and_memory_is_bounded(tmp_path: Path, small_spans: int) -> None:
    step, (whole,) = save(tmp_path, (MIB,))  # 4 MiB: sixteen spans
    files = Watched(step, parallel_reads=2, meet=threading.Barrier(2, timeout=60))
    manifest = open_step(files)
    reader = Reader(files, manifest)
    array = manifest.arrays["weight/w0"]
    result = np.empty(array.shape, np.uint32)
    (items,) = reader.items([(array, Box.whole(array.shape))], [result])
    buffers: set[int] = set()
    for item, buffer, base in reader.fetch(items):
        item.place(buffer, base)
        buffers.add(buffer.ctypes.data)
    assert torch.equal(torch.from_numpy(result.view(np.int32)), whole)  # each request had waited for another
    assert len(buffers) <= 3
    assert [size for _, size in files.ranges[1:]] == [small_spans] * 16
    assert len(files.threads - {threading.get_ident()}) == 2


def test_readers_for_one_thread_stay_in_it(tmp_path: Path, small_spans: int) -> None:
    step, (whole,) = save(tmp_path, (MIB,))
    files = Watched(step)
    assert torch.equal(read(files, Box.whole(whole.shape))[0], whole)
    assert len(files.ranges) == 17 and files.threads == {threading.get_ident()}


def test_libraries_without_coroutines_and_caches_are_asked_by_one_thread() -> None:
    class System(AsyncFileSystem):
        cachable = False

    assert RemoteFiles(System(), "bucket").parallel_reads > 1
    assert RemoteFiles(DirFileSystem("bucket", System()), "").parallel_reads > 1
    memory = fsspec.filesystem("memory")
    cached = [fsspec.filesystem(name, fs=System()) for name in ("simplecache", "filecache", "blockcache")]
    assert all(each.async_impl for each in cached), "they say of themselves what the system inside does"
    for system in (object(), memory, DirFileSystem("bucket", memory), *cached):
        assert RemoteFiles(system, "bucket").parallel_reads == 1


class Failing(LocalFiles):
    """A folder where reads of the data at byte `bad` and after fail."""

    parallel_reads = 3
    bad = 2 * MIB

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.failed: list[int] = []

    @contextlib.contextmanager
    def reader(self, name: str) -> Iterator[Any]:
        with super().reader(name) as opened:
            yield _Failing(self, opened) if name == NAME else opened


class _Failing:
    def __init__(self, files: Failing, opened: Any) -> None:
        self.files, self.expect, self.opened = files, opened.expect, opened

    def fill(self, target: memoryview, offset: int) -> None:
        if offset >= self.files.bad:
            self.files.failed.append(offset)
            raise DamageError(self.files.label(NAME), f"reading at byte {offset} failed")
        self.opened.fill(target, offset)


def reading_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("checkpoint-read")]


@pytest.mark.usefixtures("small_spans")
def test_a_read_that_fails_in_flight_ends_all_threads(tmp_path: Path) -> None:
    step, (whole,) = save(tmp_path, (MIB,))
    files = Failing(step)
    manifest = open_step(files)
    reader = Reader(files, manifest)
    wanted = [(manifest.arrays["weight/w0"], Box.whole(whole.shape))]
    (items,) = reader.items(wanted, [np.empty(whole.shape, np.uint32)])
    placed = 0
    with pytest.raises(DamageError, match=f"{NAME}.* failed") as error:
        for item, _, _ in reader.fetch(items):
            assert reading_threads()
            placed += item.bytes
    assert not reading_threads()
    assert f"at byte {min(files.failed)} " in str(error.value), "the first that is bad, whichever failed first"
    assert MIB < placed <= min(files.failed)
    reads = reader.stream(wanted)
    _, region, values = next(reads)  # and a reader who turns away
    assert reading_threads() and torch.equal(torch.from_numpy(values.view(np.int32)), whole[region.slices()])
    reads.close()
    assert not reading_threads()
    files.bad = 5 * MIB
    assert np.array_equal(reader.read(wanted)[0].view(np.int32), whole.numpy()), "the same reader reads on"


@pytest.mark.parametrize("what", ["data", "digests"])
@pytest.mark.usefixtures("small_spans", "no_collection")
def test_a_failed_read_leaves_no_memory_to_the_garbage_collection(tmp_path: Path, what: str) -> None:
    """Another step is tried then, which takes as much."""
    step, _ = save(tmp_path, (MIB,))
    files = Failing(step) if what == "data" else LocalFiles(step)
    manifest = open_step(files)
    reader = Reader(files, manifest)
    array = manifest.arrays["weight/w0"]
    reader.load_indexes([(array, Box.whole(array.shape))])

    def fail() -> weakref.ref[Any]:
        target = np.empty(array.shape, np.uint32)
        (items,) = reader.items([(array, Box.whole(array.shape))], [target])
        with contextlib.suppress(DamageError):
            for item, buffer, base in reader.fetch(items):
                item.place(buffer, base)
            pytest.fail("it did not fail")
        return weakref.ref(target)

    with contextlib.ExitStack() as broken:
        if what == "digests":
            broken.enter_context(_flipped(step / manifest.files[0].leaves, 5))
            reader._proved.clear()  # those that prove the header would do for all spans
        assert fail()() is None


def test_any_columns_of_panels_are_read(tmp_path: Path) -> None:
    step, (whole,) = save(tmp_path, (3, 64, 512))
    files = LocalFiles(step)
    manifest = open_step(files)
    array, width = manifest.arrays["weight/w0"], 512 // panels_of(manifest, files)
    assert width < 512
    edges = (0, 1, width - 1, width, width + 1, 2 * width, 3 * width - 1, 511, 512)
    columns = [(low, high) for low in edges for high in edges if low < high]
    boxes = [Box((0, 0, low), (3, 64, high - low)) for low, high in columns]
    boxes += [Box((1, 5, low), (2, 7, high - low)) for low, high in columns]
    reader = Reader(files, manifest)
    for box, found in zip(boxes, reader.read([(array, box) for box in boxes]), strict=True):
        assert torch.equal(torch.from_numpy(found.view(np.int32)), whole[box.slices()]), box
    streamed = [torch.zeros(box.shape, dtype=torch.int32) for box in boxes]
    for number, region, values in reader.stream([(array, box) for box in boxes]):
        assert values.flags.c_contiguous and values.flags.aligned
        streamed[number][region.slices(boxes[number].offsets)] = torch.from_numpy(values.view(np.int32))
    assert all(torch.equal(each, whole[box.slices()]) for each, box in zip(streamed, boxes, strict=True))


@pytest.mark.parametrize("kind", ["rank", "host"])
@pytest.mark.usefixtures("small_spans")
def test_damage_anywhere_is_noticed_by_who_reads_it(tmp_path: Path, kind: str) -> None:
    count = 9 * MIB // 2  # 18 MiB of int32: two blocks, of many spans
    step, (whole,) = save(tmp_path, (count,), files=kind)
    manifest = open_step(LocalFiles(step))
    file = manifest.files[0]
    parts = {at: Box((at,), (5000,)) for at in (0, 3 * MIB, 4 * MIB - 2500, count - 5000)}
    for at in (file.header, file.header + 12 * MIB + 77, file.header + 16 * MIB - 1, file.bytes - 1):
        with _flipped(step / file.name, file.start + at):
            where = rf"{file.name}.* at byte {at // 4096 * 4096} \(inside weight/w0\)"
            with pytest.raises(DamageError, match=where) as error:
                read(LocalFiles(step), Box.whole(whole.shape))
            assert error.value.block == at // (16 * MIB)
            for box in parts.values():
                first, last = ((file.header + 4 * edge) // 4096 for edge in (box.offsets[0], box.ends[0] - 1))
                if first <= at // 4096 <= last:
                    with pytest.raises(DamageError, match=where):
                        read(LocalFiles(step), box)
                else:
                    assert torch.equal(read(LocalFiles(step), box)[0], whole[box.slices()])
    with _flipped(step / file.name, file.start + 20), pytest.raises(DamageError, match=rf"{file.name}.* at byte 0"):
        read(LocalFiles(step), parts[0])
    digests = manifest.leaves_bytes(file)
    for at in (0, digests // 2, digests - 1):  # the leaves' in the middle, and the blocks' at the end
        with _flipped(step / file.leaves, file.digests_start + at):
            for box in (Box.whole(whole.shape), parts[3 * MIB]):
                with pytest.raises(DamageError, match=r"the digests of .* do not match the manifest"):
                    read(LocalFiles(step), box)


@contextlib.contextmanager
def _flipped(path: Path, at: int) -> Iterator[None]:
    """Flip a bit of a byte, and flip it back."""
    with path.open("r+b", buffering=0) as file:
        file.seek(at)
        (good,) = file.read(1)
        file.seek(at)
        file.write(bytes([good ^ 1]))
        yield
        file.seek(at)
        file.write(bytes([good]))
