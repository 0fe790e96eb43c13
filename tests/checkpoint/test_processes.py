"""The memory and the processes behind the saves: bounded, given back, and given up where they are stuck."""

from __future__ import annotations

import gc
import os
import re
import threading
from pathlib import Path

import pytest
import torch

from meshloom.checkpoint import faults
from meshloom.checkpoint.errors import CheckpointError
from meshloom.checkpoint.saving.staging import StagingBuffer, StagingPool
from meshloom.checkpoint.writing.writer import Writer
from meshloom.parallel.box import Box
from meshloom.parallel.fragment import Fragment
from support.checkpoint_runs import open_run, restored_step
from support.checkpoint_worlds import fragments, make_arrays
from support.mapped_memory import staging_buffers_mapped

pytestmark = pytest.mark.started_writers


def resident(process: int) -> int:
    found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{process}/status").read_text())
    assert found
    return int(found[1]) * 1024


def descriptors(process: int) -> int:
    return len(list(Path(f"/proc/{process}/fd").iterdir()))


def growing(count: int) -> list[Fragment]:
    return [Fragment(f"w{i}", "weight", (2**19,), Box.whole((2**19,)), torch.zeros(2**19)) for i in range(count)]


def test_outgrown_memory_is_released_by_writer_and_keeper(tmp_path: Path) -> None:
    before = staging_buffers_mapped(os.getpid())
    run = open_run(tmp_path, mode="async", memory_every=1)
    others = []
    for count in range(1, 7):
        for step in (1, 2, 3):
            run.save(10 * count + step, growing(count), {}, required=True)
            run.before_update()
        run.wait()
        others.append(os.open(os.devnull, os.O_RDONLY))  # takes the number of a descriptor that was closed
    writer, memory = run._context.writer, run._context.memory
    assert writer._process is not None
    assert memory is not None and memory._keeper is not None
    counts = [staging_buffers_mapped(pid) for pid in (os.getpid(), writer._process.pid, memory._keeper._process.pid)]
    run.finish()
    for other in others:
        os.close(other)
    counts[0] -= before
    assert max(counts) <= 3, counts


def test_the_old_memory_is_gone_before_the_larger_one_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    make = StagingBuffer.__init__

    def count(buffer: StagingBuffer, *rest: object) -> None:
        make(buffer, *rest)  # type: ignore[arg-type]
        seen.append(staging_buffers_mapped(os.getpid()))

    monkeypatch.setattr(StagingBuffer, "__init__", count)
    before = staging_buffers_mapped(os.getpid())
    pool = StagingPool(None, count=1)
    for size in (1, 2, 4):
        pool.take_back(pool.lend(size * 2**22, 0.0))
    pool.close()
    assert [there - before for there in seen] == [1, 1, 1]


def test_memory_that_somebody_looks_at_goes_when_they_do(caplog: pytest.LogCaptureFixture) -> None:
    gc.collect()
    before = staging_buffers_mapped(os.getpid()), descriptors(os.getpid())
    buffer = StagingBuffer(2**22, pin=False)
    looks = buffer.image(1)
    buffer.close()
    assert "given back only when nobody looks" in caplog.text
    assert looks[0] == 0 and staging_buffers_mapped(os.getpid()) == before[0] + 1
    del looks, buffer
    assert (staging_buffers_mapped(os.getpid()), descriptors(os.getpid())) == before


def test_memory_that_is_not_to_be_had_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(buffer: StagingBuffer) -> None:
        raise CheckpointError("no memory")

    run = open_run(tmp_path, failures=99)
    gc.collect()
    before = descriptors(os.getpid())
    with monkeypatch.context() as patch:
        patch.setattr(StagingBuffer, "_populate", refuse)
        for step in range(1, 6):
            run.save(step, fragments(make_arrays(), 1, 0)[0], {})
    assert {report.reason for report in run.poll()} == {"no memory"}
    assert descriptors(os.getpid()) <= before
    run.save(6, fragments(make_arrays(6), 1, 0)[0], {})
    run.finish()
    assert restored_step(tmp_path) == 6


@pytest.mark.parametrize("mode", ["async", "sync"])
def test_two_hundred_saves_take_no_more_than_fifty(tmp_path: Path, mode: str, caplog: pytest.LogCaptureFixture) -> None:
    run = open_run(tmp_path, mode=mode, keep=1)
    held = fragments(make_arrays(), 1, 0)[0]
    assert run._context.writer._process is not None
    processes = [os.getpid(), run._context.writer._process.pid]
    taken: list[list[int]] = []
    for step in range(1, 201):
        run.save(step, held, {}, required=True)
        run.before_update()
        run.poll()
        if step in (50, 200):
            run.wait()
            for save in run._leaving:
                save.leave()
            gc.collect()
            counts = [len(gc.get_objects()), threading.active_count(), run.control.store.num_keys()]
            taken.append(counts + [of(process) for process in processes for of in (descriptors, resident)])
    run.finish()
    assert "could not be deleted" not in caplog.text
    objects, threads, keys, *pairs = (late - early for early, late in zip(*taken, strict=True))
    assert objects < 150 and threads <= 1 and keys <= 8, "keys: those of the last rounds"
    assert max(pairs[::2]) <= 2 and max(pairs[1::2]) < 4 * 2**20, "descriptors, or memory"


@pytest.mark.parametrize("mode", ["async", "sync"])
@pytest.mark.parametrize("boundary", ["data.write.before", "data.fsync.before", "leaves.fsync.before", "hash.after"])
def test_stuck_writer_is_abandoned_and_replaced_for_next_save(
    tmp_path: Path, mode: str, boundary: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(faults.VARIABLE, f"hang:{boundary}")
    run = open_run(tmp_path, mode=mode, timeout=60)
    monkeypatch.delenv(faults.VARIABLE)
    end = Writer.end
    with monkeypatch.context() as patch:  # the next writer may need longer to start than this one is given to get on
        patch.setattr(Writer, "end", lambda writer, _: end(writer, 0.5))
        run.save(1, fragments(make_arrays(1), 1, 0)[0], {})
        run.before_update()
        (report,) = run.wait()
    assert report.outcome == "failed" and "rank-00000.safetensors got no further" in report.reason
    assert "checkpoint.timeout" in report.reason
    assert not list(tmp_path.glob("step-*"))
    run.save(2, fragments(make_arrays(2), 1, 0)[0], {})
    run.before_update()
    run.finish()
    assert restored_step(tmp_path) == 2
