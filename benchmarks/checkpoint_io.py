"""Compare how fast a checkpoint reaches the disk: raw O_DIRECT, safetensors, torch DCP in its modes, Meshloom.

    python benchmarks/checkpoint_io.py [--gib 1] [--tensors 64 4096] [--rounds 5] [--folder .] [--only Meshloom] [--reads]

One process, fp32, everything fsynced. Rounds are interleaved, each in an order of its own since what one mode deletes still
busies the disk under the next, and medians printed, since disks and neighbours are not constant. "blocks": until the trainer
may go on (for Meshloom async: the call; "staged": until it may change the tensors).
"""

# pyright: basic, reportMissingImports=false, reportPrivateImportUsage=false

from __future__ import annotations

import argparse
import functools
import itertools
import logging
import mmap
import os
import platform
import queue
import random
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

from meshloom.checkpoint.checkpointer import Checkpointer
from meshloom.checkpoint.config import CheckpointConfig
from meshloom.checkpoint.control import Control
from meshloom.checkpoint.folder import step_name
from meshloom.checkpoint.restore import restore
from meshloom.parallel.box import Box
from meshloom.parallel.fragment import Fragment

Times = dict[str, float]  # blocks, staged, total: seconds


@dataclass
class Bench:
    """One number of tensors: the modes, and what they took."""

    tensors: list[torch.Tensor]
    folder: Path
    took: dict[str, list[Times]] = field(default_factory=dict)

    def fragments(self) -> list[Fragment]:
        """The tensors as Meshloom sees them."""
        return [Fragment(f"t{i}", "weight", tuple(t.shape), Box.whole(t.shape), t) for i, t in enumerate(self.tensors)]

    def state(self) -> dict[str, Any]:
        """The tensors as DCP sees them."""
        return {f"t{i}": tensor for i, tensor in enumerate(self.tensors)}

    def fresh(self) -> Path:
        """A folder that did not exist."""
        path = self.folder / "save"
        shutil.rmtree(path, ignore_errors=True)
        return path


def write_raw(path: Path, memory: mmap.mmap) -> None:
    """Write a buffer past the page cache, and fsync."""
    descriptor = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_DIRECT)
    view = memoryview(memory)
    for at in range(0, len(view), 8 << 20):
        os.pwrite(descriptor, view[at : at + (8 << 20)], at)
    os.fsync(descriptor)
    os.close(descriptor)


def raw(bench: Bench, memory: mmap.mmap) -> Times:
    """The floor: the bytes of a page-aligned buffer with O_DIRECT, then fsync."""
    path = bench.fresh()
    start = time.perf_counter()
    write_raw(path, memory)
    took = time.perf_counter() - start
    path.unlink()
    return {"blocks": took, "total": took}


def sync_tree(path: Path) -> None:
    """fsync a file, or the files of a folder and the folder."""
    for entry in [*(path.rglob("*") if path.is_dir() else ()), path]:
        descriptor = os.open(entry, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def with_safetensors(bench: Bench) -> Times:
    """safetensors' own writer, then fsync."""
    path = bench.fresh()
    start = time.perf_counter()
    save_file(bench.state(), path)
    sync_tree(path)
    took = time.perf_counter() - start
    path.unlink()
    return {"blocks": took, "total": took}


def dcp_save(bench: Bench, threads: int) -> Times:
    """DCP, synchronous (its writer fsyncs)."""
    start = time.perf_counter()
    dcp.save(bench.state(), storage_writer=dcp.FileSystemWriter(bench.fresh(), thread_count=threads))
    took = time.perf_counter() - start
    return {"blocks": took, "total": took}


def dcp_async(bench: Bench, kind: AsyncCheckpointerType, stager: DefaultStager | None) -> Times:
    """DCP's async_save; with a stager that stages in the background, `staged` is when it is done."""
    start = time.perf_counter()
    writer = dcp.FileSystemWriter(bench.fresh())
    more: Any = {"async_stager": stager} if stager else {}
    response: Any = dcp.async_save(bench.state(), storage_writer=writer, async_checkpointer_type=kind, **more)
    blocks = time.perf_counter() - start
    staged = blocks
    if hasattr(response, "staging_completion"):
        response.staging_completion.result()
        staged = time.perf_counter() - start
        response.upload_completion.result()
    else:
        response.result()
    return {"blocks": blocks, "staged": staged, "total": time.perf_counter() - start}


def ours(bench: Bench, checkpointer: Checkpointer, step: int) -> Times:
    """Meshloom, hashing included, until the commit; the step is deleted out of the time, as the others' files are."""
    held = bench.fragments()
    start = time.perf_counter()
    checkpointer.save(step, held, {"step": step}, required=True)
    blocks = time.perf_counter() - start
    checkpointer.before_update()
    staged = time.perf_counter() - start
    while not (reports := checkpointer.poll()):
        time.sleep(0.001)
    total = time.perf_counter() - start
    assert reports[0].outcome == "committed", reports[0].reason
    shutil.rmtree(bench.folder / f"{checkpointer.config.mode}-{checkpointer.config.files}" / step_name(step))
    return {"blocks": blocks, "staged": staged, "total": total}


def measure(bench: Bench, rounds: int, memory: mmap.mmap, only: str) -> None:
    """All modes, or raw and those with `only` in their names, interleaved; the first round warms up and does not count."""
    in_background = StagingOptions(False, True, True, False)  # pinned memory needs a GPU
    reused = DefaultStager(StagingOptions(False, False, False, False))
    shared = DefaultStager(in_background)
    steps = itertools.count(1)
    thread, process = AsyncCheckpointerType.THREAD, AsyncCheckpointerType.PROCESS
    mine = {
        kind: Checkpointer(
            bench.folder / "-".join(kind), Control.alone(), CheckpointConfig(mode=kind[0], files=kind[1], keep=0)
        )
        for kind in KINDS
    }
    for checkpointer in mine.values():
        checkpointer.prepare(bench.fragments())
    modes: dict[str, Callable[[], Times]] = {
        "raw O_DIRECT + fsync": lambda: raw(bench, memory),
        "safetensors + fsync": lambda: with_safetensors(bench),
        "DCP save": lambda: dcp_save(bench, 1),
        "DCP save, 2 threads": lambda: dcp_save(bench, 2),
        "DCP async, thread": lambda: dcp_async(bench, thread, None),
        "DCP async, thread, reused stager": lambda: dcp_async(bench, thread, reused),
        "DCP async, process": lambda: dcp_async(bench, process, None),
        "DCP async, process, shared memory": lambda: dcp_async(bench, process, shared),
        **{f"Meshloom {', files='.join(kind)}": lambda kind=kind: ours(bench, mine[kind], next(steps)) for kind in KINDS},
    }
    chosen = {name: mode for name, mode in modes.items() if only in name or name.startswith("raw")}
    for number in range(rounds + 1):
        for name, mode in random.Random(number).sample(list(chosen.items()), len(chosen)):
            os.sync()
            try:
                took = mode()
            except Exception as error:
                print(f"{name}: {type(error).__name__}: {str(error)[:100]}", flush=True)
                continue
            if number:
                bench.took.setdefault(name, []).append(took)
    for checkpointer in mine.values():
        checkpointer.finish()


KINDS = (("sync", "rank"), ("async", "rank"), ("async", "host"))  # checkpoint.mode and checkpoint.files


def report(bench: Bench) -> None:
    """The table."""
    floor = statistics.median(took["total"] for took in bench.took["raw O_DIRECT + fsync"])
    print(f"\n| {len(bench.tensors)} tensors | blocks s | staged s | total s | × raw |\n|---|---:|---:|---:|---:|")
    for name, runs in sorted(bench.took.items()):
        blocks, staged, total = (
            statistics.median(run.get(key, run["blocks"]) for run in runs) for key in ("blocks", "staged", "total")
        )
        print(f"| {name} | {blocks:.3f} | {staged:.3f} | {total:.2f} | {total / floor:.2f} |")


def forget(folder: Path) -> None:
    """Ask the page cache to forget the files of a folder."""
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read_raw(folder: Path, threads: int, direct: bool) -> float:
    """Seconds to read the files of a folder in requests of 16 MiB, so many at once, into memory that is there already."""
    chunk = 16 << 20
    buffers = queue.SimpleQueue[mmap.mmap]()
    for _ in range(threads):
        buffers.put(mmap.mmap(-1, chunk))

    def read(descriptor: int, at: int) -> None:
        buffer = buffers.get()
        os.preadv(descriptor, [buffer], at)
        buffers.put(buffer)

    for _ in range(threads):  # touched before the clock starts
        buffer = buffers.get()
        buffer[:] = bytes(chunk)
        buffers.put(buffer)
    start = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        for path in folder.iterdir():
            descriptor = os.open(path, os.O_RDONLY | (os.O_DIRECT if direct else 0))
            list(pool.map(functools.partial(read, descriptor), range(0, path.stat().st_size, chunk)))
            os.close(descriptor)
    return time.perf_counter() - start


RAW_READS = {"raw, 1 at once": (1, False), "raw, 4 at once": (4, False), "raw O_DIRECT, 4 at once": (4, True)}
SHARES = {"all": (0, 1), "an eighth of the rows": (0, 8), "an eighth of every row": (1, 8)}  # (dim, share)


def reads(bench: Bench, files: str, rounds: int) -> None:
    """Print the medians of restoring all and eighths, and of raw reads of the same files, interleaved, from the disk.

    Fragments are in memory that is there already, as a run's weights are. Bytes: those that are needed, and those that are
    read for them, digests of the leaves included.
    """
    folder = bench.folder / f"reads-{files}"
    checkpointer = Checkpointer(folder, Control.alone(), CheckpointConfig(mode="sync", files=files))
    checkpointer.save(1, bench.fragments(), {"step": 1})
    checkpointer.finish()
    seconds: dict[str, list[float]] = {name: [] for name in (*SHARES, *RAW_READS)}
    sizes: dict[str, str] = {}
    for number in range(rounds):
        for what in random.Random(number).sample(list(seconds), len(seconds)):
            wanted = _fragments(bench, *SHARES[what]) if what in SHARES else []
            forget(folder / step_name(1))
            if what in RAW_READS:
                seconds[what].append(read_raw(folder / step_name(1), *RAW_READS[what]))
                continue
            found = restore(folder, wanted, Control.alone())
            assert all(torch.equal(f.tensor, bench.tensors[i][f.box.slices()]) for i, f in enumerate(wanted))
            ratio = found.bytes_read / found.bytes_wanted
            sizes[what] = f"{found.bytes_wanted / 2**20:.0f} | {found.bytes_read / 2**20:.0f} | {ratio:.2f}"
            seconds[what].append(found.seconds)
    print(f"\n| files={files}, {len(bench.tensors)} tensors | needed MiB | read MiB | ratio | s: median (least–most) |")
    print("|---|---:|---:|---:|---:|")
    for what, took in seconds.items():
        times = f"{statistics.median(took):.2f} ({min(took):.2f}–{max(took):.2f})"
        print(f"| {what} | {sizes.get(what, '– | – | –')} | {times} |")


def _fragments(bench: Bench, dim: int, share: int) -> list[Fragment]:
    """The same part of every tensor, to be read into."""
    wanted: list[Fragment] = []
    for index, tensor in enumerate(bench.tensors):
        offsets, shape = [0, 0], list(tensor.shape)
        shape[dim] //= share
        offsets[dim] = 3 * shape[dim] % tensor.shape[dim]
        box = Box(tuple(offsets), tuple(shape))
        wanted.append(Fragment(f"t{index}", "weight", tuple(tensor.shape), box, torch.full(shape, -1.0)))
    return wanted


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--tensors", type=int, nargs="+", default=[64, 4096])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path())
    parser.add_argument("--only", default="", help="part of the names of the modes to measure beside raw")
    parser.add_argument("--reads", action="store_true", help="only read")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    machine = f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}, {platform.release()}"
    print(f"{arguments.gib} GiB, {machine}")
    for count in arguments.tensors:
        side = int((arguments.gib * 2**28 / count) ** 0.5)
        with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="checkpoint-io-") as name:
            bench = Bench([torch.randn(side, side) for _ in range(count)], Path(name))
            memory = mmap.mmap(-1, sum(tensor.numel() * 4 for tensor in bench.tensors) // 4096 * 4096)
            memory[:] = os.urandom(1 << 20) * (len(memory) // (1 << 20)) + bytes(len(memory) % (1 << 20))
            if not arguments.reads:
                measure(bench, arguments.rounds, memory, arguments.only)
                report(bench)
            for files in ("rank", "host"):
                reads(bench, files, arguments.rounds)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
