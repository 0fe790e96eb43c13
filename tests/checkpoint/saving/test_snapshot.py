"""Copies from a GPU, on a machine that runs the queued work of its streams in any order that events allow.

The order on a real GPU is one of these. Here they are drawn at random, with the update queued as soon as it may be, so that
a missing wait shows as a torn snapshot or as spare memory that is used twice.
"""

from __future__ import annotations

import itertools
import random
from collections import deque
from collections.abc import Callable
from contextlib import closing, contextmanager
from typing import Any

import pytest
import torch

from meshloom.checkpoint.planning.description import Description, declare
from meshloom.checkpoint.planning.plan import FileLayout, SavePlan, lay_out
from meshloom.checkpoint.saving import snapshot as snapshot_module
from meshloom.checkpoint.saving.device import ALIGNMENT, SPARE_UNIT, Device, set_aside
from meshloom.checkpoint.saving.snapshot import Snapshot
from meshloom.checkpoint.saving.staging import StagingBuffer
from meshloom.parallel.box import Box
from meshloom.parallel.fragment import Fragment


class Machine:
    """Streams of work; `step` lets one of them do its next piece, if what it waits for has happened."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.streams: list[FakeStream] = []
        self.trainer = FakeStream(self)
        self.current = self.trainer
        self.free = 0

    def step(self) -> bool:
        ready = [stream for stream in self.streams if stream.work and stream.work[0][0]()]
        if not ready:
            return False
        self.rng.choice(ready).work.popleft()[1]()
        return True

    @contextmanager
    def use(self, stream: FakeStream):
        before, self.current = self.current, stream
        yield
        self.current = before


class FakeStream:
    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.work: deque[tuple[Callable[[], bool], Callable[[], None]]] = deque()
        machine.streams.append(self)

    def put(self, action: Callable[[], None]) -> None:
        self.work.append((lambda: True, action))

    def wait_event(self, event: FakeEvent) -> None:
        self.work.append((event.query, lambda: None))

    def synchronize(self) -> None:
        while self.work:
            assert self.machine.step(), "the stream waits for what never comes"


class FakeEvent:
    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.happened = False

    def record(self, stream: FakeStream) -> None:
        stream.put(lambda: setattr(self, "happened", True))

    def query(self) -> bool:
        return self.happened

    def synchronize(self) -> None:
        while not self.happened:
            assert self.machine.step(), "the copies wait for each other"

    def elapsed_time(self, other: FakeEvent) -> float:
        return 100.0


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Machine]:
    """Makes torch's streams and events those of a machine."""

    def make(seed: int) -> Machine:
        machine = Machine(seed)
        monkeypatch.setattr(torch.cuda, "Stream", lambda *_, **__: FakeStream(machine))
        monkeypatch.setattr(torch.cuda, "Event", lambda **_: FakeEvent(machine))
        monkeypatch.setattr(torch.cuda, "stream", machine.use)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _: machine.current)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (machine.free, 0))

        def copy(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
            for target, source in zip(targets, sources, strict=True):
                machine.current.put(lambda target=target, source=source: target.copy_(source))

        monkeypatch.setattr(snapshot_module, "_copy_on_device", copy)
        monkeypatch.setattr(snapshot_module, "BATCH_BYTES", 20_000)
        return machine

    return make


def tensors() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(256, 256), (300, 40), (17,), (), (1024, 64), (64, 1000), (3, 5, 7)]
    made = [torch.randn(shape, generator=generator) for shape in shapes]
    return [*made, made[0].t().contiguous().t(), torch.arange(9000), torch.randn(50, 50, generator=generator).bfloat16()]


def held(values: list[torch.Tensor]) -> tuple[list[Fragment], FileLayout]:
    fragments = [Fragment(f"t{i}", "weight", tuple(t.shape), Box.whole(t.shape), t) for i, t in enumerate(values)]
    declared = declare(fragments)
    return fragments, lay_out(declared, SavePlan.of(Description.of(declared, 0)).pieces(0, declared))


def filled(fragments: list[Fragment], layout: FileLayout) -> bytes:
    """The file as copies on the host make it."""
    with closing(StagingBuffer(layout.bytes, pin=False)) as buffer:
        Snapshot(fragments).copy(buffer, layout, None)
        return content(buffer, layout)


def content(buffer: StagingBuffer, layout: FileLayout) -> bytes:
    with buffer.image(layout.bytes) as image:
        return bytes(image)


class Issued:
    """Stands in for the event of the copies being queued: at that moment the trainer queues its wait and the update."""

    def __init__(self, then: Callable[[], None]) -> None:
        self.then: Callable[[], None] | None = then

    def set(self) -> None:
        then, self.then = self.then, None
        if then is not None:
            then()

    def wait(self, timeout: float) -> bool:
        return True


@pytest.mark.parametrize("room", [0, 1, 2, 6])
@pytest.mark.parametrize("seed", range(12))
def test_no_order_that_the_events_allow_tears_a_snapshot(gpu: Any, seed: int, room: int) -> None:
    machine = gpu(seed)
    values = tensors()
    fragments, layout = held(values)
    device = Device(torch.device("cpu"))
    device.spare = [torch.zeros(300_000, dtype=torch.uint8) for _ in range(room)]
    ahead = tensors()  # what the values will be when the trainer gets there
    for _ in range(3):
        expected = filled(held(ahead)[0], layout)
        for value in ahead:
            value.add_(1)
        buffer = StagingBuffer(layout.bytes, pin=False)
        with machine.use(machine.trainer):
            snapshot = Snapshot(fragments)
            snapshot._device = torch.device("cpu")
            snapshot._begun = torch.cuda.Event()
            snapshot._begun.record(machine.trainer)  # type: ignore[arg-type]

            def update(snapshot: Snapshot = snapshot) -> None:
                with machine.use(machine.trainer):
                    snapshot.wait(1.0)
                for value in values:
                    machine.trainer.put(lambda value=value: value.add_(1))

            snapshot._issued = Issued(update)  # type: ignore[assignment]
            snapshot.copy(buffer, layout, device)
        assert content(buffer, layout) == expected
        buffer.close()
    while machine.step():
        pass
    assert filled(fragments, layout) == filled(held(ahead)[0], layout)


@pytest.mark.parametrize("seed", range(4))
def test_a_copy_that_fails_half_way_leaves_nothing_queued(gpu: Any, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Afterwards the update may change the tensors, or free them, and another save gets the staging buffer."""
    machine = gpu(seed)
    fragments, layout = held(tensors())
    device = Device(torch.device("cpu"))
    device.spare = [torch.zeros(300_000, dtype=torch.uint8)]
    queue, left = Snapshot._queue, 5

    def fail(*rest: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
            raise RuntimeError("out of memory")
        return queue(*rest)

    monkeypatch.setattr(Snapshot, "_queue", fail)
    snapshot = Snapshot(fragments)
    snapshot._device = torch.device("cpu")
    snapshot._begun = torch.cuda.Event()
    snapshot._begun.record(machine.trainer)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="out of memory"), closing(StagingBuffer(layout.bytes, pin=False)) as buffer:
        snapshot.copy(buffer, layout, device)
    assert left == 0
    assert not any(stream.work for stream in device.streams)  # type: ignore[attr-defined]


def test_spare_memory_follows_what_saves_cost_and_what_is_free(gpu: Any, caplog: pytest.LogCaptureFixture) -> None:
    machine = gpu(0)
    device = Device(torch.device("cpu"))
    machine.free = 10 * SPARE_UNIT
    device.make_room()
    assert device.spare_bytes == 0
    device.learn(stall=0.0001, rate=1e9, size=10**9)  # too little to care
    device.make_room()
    assert device.spare_bytes == 0
    device.learn(stall=0.1, rate=1e9, size=10**9)  # 100 MB came too late; with a margin, in units of 64 MiB
    device.make_room()
    assert device.spare_bytes == 2 * SPARE_UNIT
    device.learn(stall=10.0, rate=1e9, size=SPARE_UNIT * 4)  # never more than the snapshot, and a unit
    device.make_room()
    assert device.spare_bytes == 5 * SPARE_UNIT and not caplog.records
    machine.free = 3 * SPARE_UNIT
    device.learn(stall=1.0, rate=1e9, size=10**9)
    for _ in range(3):
        device.make_room()
    assert device.spare_bytes == 6 * SPARE_UNIT  # half of what was free
    assert len(caplog.records) == 1 and "GPU memory" in caplog.text


def test_spare_memory_keeps_to_the_limit_given(gpu: Any, caplog: pytest.LogCaptureFixture) -> None:
    gpu(0).free = 100 * SPARE_UNIT
    for limit, expected in ((0, 0), (3 * SPARE_UNIT, 3 * SPARE_UNIT)):
        device = Device(torch.device("cpu"), limit)
        for _ in range(4):
            device.learn(stall=1.0, rate=2.0 * SPARE_UNIT, size=10**9)
            device.make_room()
        assert device.spare_bytes == expected
        assert "checkpoint.device_memory_gib" in caplog.text
        caplog.clear()


def test_reserved_space_is_the_files_end_without_overlap() -> None:
    rng = random.Random(3)
    for _ in range(200):
        sizes = [rng.choice([4, 100, 512, 3000]) for _ in range(rng.randrange(12))]
        rooms = [rng.choice([0, 512, 2000, 9000]) for _ in range(rng.randrange(4))]
        first, places = set_aside(sizes, rooms)
        assert len(places) == len(sizes) - first
        for room, capacity in enumerate(rooms):
            spans = sorted((at, at + size) for size, (r, at) in zip(sizes[first:], places, strict=True) if r == room)
            assert all(at % ALIGNMENT == 0 and end <= capacity for at, end in spans)
            assert all(one[1] <= other[0] for one, other in itertools.pairwise(spans))
    assert set_aside([100, 100], [512, 512]) == (0, [(1, 0), (0, 0)])
    assert set_aside([100], []) == (1, [])
