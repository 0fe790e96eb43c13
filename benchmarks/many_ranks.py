"""Save with many real processes, kill them in the middle of a save, and resume on another number of them.

    python benchmarks/many_ranks.py [saved=64] [resumed=48] [out=FILE.json]

Every rank is a process forked from this one, with its share of a few small arrays, a client of one store over TCP, and the real
checkpointer with its writer process. What is resumed is held to what was saved, bit by bit. Seconds are of the clock: they say
how loaded the machine was, too, and nothing of a cluster's network.
"""

# pyright: basic, reportMissingImports=false

from __future__ import annotations

import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch._C._distributed_c10d import PrefixStore, TCPStore

from meshloom.checkpoint.checkpointer import Checkpointer
from meshloom.checkpoint.config import CheckpointConfig
from meshloom.checkpoint.control import Control
from meshloom.checkpoint.restore import restore
from meshloom.parallel.fragment import Fragment, boxes_of_flat_range

SHAPES = {"embed": (997, 16), "matrix": (256, 64), "norm": (64,)}
ROLES = ("weight", "exp_avg", "exp_avg_sq")


def value_of(name: str, role: str, step: int) -> torch.Tensor:
    """The whole array of a step, which every process can draw."""
    seed = random.Random(f"{name} {role} {step}").randrange(2**31)
    return torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(seed))


def share(rank: int, ranks: int, step: int | None) -> list[Fragment]:
    """A rank's flat share of every array, as ZeRO cuts them; step=None: blank."""
    found: list[Fragment] = []
    for name, shape in SHAPES.items():
        total = torch.Size(shape).numel()
        part = -(-total // ranks)
        start = min(rank * part, total)
        for box, _ in boxes_of_flat_range(shape, start, min(part, total - start)):
            for role in ROLES:
                whole = torch.zeros(shape) if step is None else value_of(name, role, step)
                found.append(Fragment(name, role, shape, box, whole[box.slices()].clone()))
    return found


def fork(ranks: int, body: Callable[[Control], dict[str, Any] | None], folder: Path) -> list[int]:
    """Start the ranks; what each returns is left in the folder. Returns their processes."""
    port = host_store()
    children: list[int] = []
    for rank in range(ranks):
        child = os.fork()
        if not child:
            code = 1
            try:
                client = TCPStore("127.0.0.1", port, is_master=False)
                said = body(Control(rank, ranks, PrefixStore("ranks", client)))
                (folder / f"{rank}.json").write_text(json.dumps(said))
                code = 0
            except Exception:
                traceback.print_exc()
            finally:
                os._exit(code)
        children.append(child)
    return children


def host_store() -> int:
    """Start a store in a process of its own, which ends with this one. Returns its port.

    A process with the store's threads must not be forked: a child may find a lock held by a thread that it does not have.
    """
    reading, writing = os.pipe()
    parent = os.getpid()
    if not os.fork():
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        os.write(writing, f"{store.port}\n".encode())
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        return int(pipe.readline())


def has_ended(child: int) -> bool:
    """Return whether a process has ended. Its exit code stays there for `end_of`."""
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def end_of(children: list[int]) -> int:
    """Wait for processes. Returns how many have failed."""
    return sum(os.waitpid(child, 0)[1] != 0 for child in children)


def main(argv: list[str]) -> int:
    """Run it, and print what it took."""
    given = dict(word.split("=", 1) for word in argv)
    ranks, others = int(given.get("saved", "64")), int(given.get("resumed", "48"))
    torch.set_num_threads(1)
    row: dict[str, Any] = {"saved by": ranks, "resumed by": others, "load before": os.getloadavg()[0]}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "checkpoints"

        def save(control: Control) -> dict[str, Any] | None:
            begun = time.perf_counter()
            checkpointer = Checkpointer(folder, control, CheckpointConfig(mode="async", timeout=300, keep=0))
            said: dict[str, Any] = {"open": time.perf_counter() - begun}
            for step in (1, 2):
                begun = time.perf_counter()
                checkpointer.save(step, share(control.rank, ranks, step), {"step": step})
                (report,) = checkpointer.wait()
                assert report.outcome == "committed", report.reason
                said[f"save {step}"] = time.perf_counter() - begun
            (Path(place) / f"{control.rank}.saved").write_text(json.dumps(said))
            checkpointer.save(3, share(control.rank, ranks, 3), {"step": 3}, hold=True)
            checkpointer.before_update()
            (Path(place) / f"{control.rank}.in-three").touch()
            time.sleep(600)  # with its third save under way, until it is killed
            return None

        children = fork(ranks, save, Path(place))
        try:
            while len(list(Path(place).glob("*.in-three"))) < ranks:
                assert not any(map(has_ended, children)), "a rank has ended before its last save"
                time.sleep(0.1)
        finally:
            for child in children:
                os.kill(child, signal.SIGKILL)
        row["killed in a save"] = end_of(children)
        said = [json.loads((Path(place) / f"{rank}.saved").read_text()) for rank in range(ranks)]
        for name in ("open", "save 1", "save 2"):
            row[f"{name}, s (slowest rank)"] = round(max(each[name] for each in said), 2)

        def resume(control: Control) -> dict[str, Any] | None:
            begun = time.perf_counter()
            held = share(control.rank, others, None)
            report = restore(folder, held, control, timeout=300)
            took = time.perf_counter() - begun
            expected = share(control.rank, others, report.step)
            same = all(torch.equal(one.tensor, two.tensor) for one, two in zip(held, expected, strict=True))
            return {"step": report.step, "same": same, "seconds": took}

        failed = end_of(fork(others, resume, Path(place)))
        found = [json.loads((Path(place) / f"{rank}.json").read_text()) for rank in range(others)] if not failed else []
        row |= {"failed": failed, "step": sorted({each["step"] for each in found})}
        row["ranks with other bits"] = sum(not each["same"] for each in found)
        row["resume, s (slowest rank)"] = round(max((each["seconds"] for each in found), default=0.0), 2)
        row["load after"] = os.getloadavg()[0]
    print(json.dumps(row, indent=1))
    if "out" in given:
        Path(given["out"]).write_text(json.dumps(row))
    return int(bool(failed or row["ranks with other bits"] or row["step"] != [2]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
