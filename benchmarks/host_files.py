"""Compare files of ranks with files of hosts: several ranks of this host save some GiB together, and read it again.

    python benchmarks/host_files.py [--gib 1] [--ranks 4] [--rounds 7] [--folder .]

fp32 in mode sync, everything fsynced, from the call to the commit. "raw": each rank writes as much with O_DIRECT into a file
of its own. Reading is from the disk: the page cache is asked to forget the files. Rounds are interleaved, in an order of
their own, and medians printed.
"""

# pyright: basic, reportMissingImports=false

from __future__ import annotations

import argparse
import mmap
import multiprocessing
import os
import platform
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from checkpoint_io import write_raw
from torch._C._distributed_c10d import FileStore

from meshloom.checkpoint.checkpointer import Checkpointer
from meshloom.checkpoint.config import CheckpointConfig
from meshloom.checkpoint.control import Control
from meshloom.checkpoint.folder import step_name
from meshloom.checkpoint.restore import restore
from meshloom.parallel.box import Box
from meshloom.parallel.fragment import Fragment

TENSORS = 16
FILES = ("rank", "host")


def held_by(rank: int, ranks: int, gib: float) -> list[Fragment]:
    """A rank's rows of every tensor."""
    columns = 1024
    rows = int(gib * 2**28 / columns / TENSORS / ranks)
    box = Box((rank * rows, 0), (rows, columns))
    return [Fragment(f"t{i}", "weight", (rows * ranks, columns), box, torch.randn(rows, columns)) for i in range(TENSORS)]


def forget(folder: Path) -> None:
    """Ask the page cache to forget the files of a folder."""
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def play(rank: int, folder: Path, arguments: argparse.Namespace, barrier: Any, answer: Any) -> None:
    """One rank. Rank 0 answers with the seconds of each thing: until the last rank had done it."""
    torch.set_num_threads(1)
    ranks = arguments.ranks
    held = held_by(rank, ranks, arguments.gib)
    store = FileStore(str(folder / "store"), ranks)
    control = Control(rank, ranks, store)
    mine = {kind: Checkpointer(folder / kind, control, CheckpointConfig(mode="sync", files=kind, keep=0)) for kind in FILES}
    memory = mmap.mmap(-1, sum(fragment.tensor.nbytes for fragment in held) // 4096 * 4096)
    took: dict[str, list[float]] = {}

    def timed(name: str, counts: bool, action: Callable[[], object]) -> None:
        if rank == 0:
            os.sync()
        barrier.wait()
        start = time.perf_counter()
        action()
        barrier.wait()
        if counts:
            took.setdefault(name, []).append(time.perf_counter() - start)

    for number in range(arguments.rounds + 1):  # the first one warms up
        for kind in random.Random(number).sample(("raw", *FILES), 3):
            if kind == "raw":
                timed("raw, written", number > 0, lambda: write_raw(folder / f"raw-{rank}", memory))
                (folder / f"raw-{rank}").unlink()
                continue
            timed(f"files={kind}, saved", number > 0, lambda k=kind, n=number: mine[k].save(n + 1, held, {}, required=True))
            assert [report.outcome for report in mine[kind].poll()] == ["committed"]
            step = folder / kind / step_name(number + 1)
            values = [Fragment(f.name, f.role, f.global_shape, f.box, torch.empty_like(f.tensor)) for f in held]
            if rank == 0:
                forget(step)
            timed(f"files={kind}, read", number > 0, lambda s=step, v=values: restore(s, v, control))
            assert all(torch.equal(one.tensor, other.tensor) for one, other in zip(values, held, strict=True))
            barrier.wait()
            if rank == 0:
                shutil.rmtree(step)
    for checkpointer in mine.values():
        checkpointer.finish()
    if rank == 0:
        answer.put(took)


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, default=Path())
    arguments = parser.parse_args()
    context = multiprocessing.get_context("fork")
    barrier, answer = context.Barrier(arguments.ranks), context.SimpleQueue()
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="host-files-") as name:
        ranks = [
            context.Process(target=play, args=(rank, Path(name), arguments, barrier, answer)) for rank in range(arguments.ranks)
        ]
        for process in ranks:
            process.start()
        took: dict[str, list[float]] = answer.get()
        for process in ranks:
            process.join()
    machine = f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}, {platform.release()}"
    print(
        f"{arguments.gib} GiB of {arguments.ranks} ranks, {machine}\n\n| | median s | least s | most s |\n|---|---:|---:|---:|"
    )
    for what, seconds in sorted(took.items()):
        print(f"| {what} | {statistics.median(seconds):.2f} | {min(seconds):.2f} | {max(seconds):.2f} |")


if __name__ == "__main__":
    main()
