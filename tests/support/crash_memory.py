"""The crash lab of the in-memory tier: trainers, keepers and whole nodes die at a boundary of a run that saves into memory.

A run has four ranks on two nodes, in groups of two that mirror each other across the nodes, and keeps steps 1, 2 and 3 in
memory alone. At the n-th boundary that a process passes, it is killed, or its node is: all trainers and keepers there. The
launcher then ends the other trainers. Then the judge, in this process, restores from the keepers that are left.

The invariant: one failure costs no step that any rank was told is kept, and what is restored is one step, bit for bit.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from torch.distributed import FileStore

from meshloom.checkpoint import faults
from meshloom.checkpoint.checkpointer import Checkpointer
from meshloom.checkpoint.config import CheckpointConfig
from meshloom.checkpoint.control import Control
from meshloom.checkpoint.errors import CheckpointError
from meshloom.checkpoint.memory.keeper import dismiss, registered
from meshloom.checkpoint.memory.tier import DOMAIN_VARIABLE
from meshloom.checkpoint.restore import restore
from support.checkpoint_worlds import fragments, holds, make_arrays
from support.crash import wait

WORLD, NODES, STEPS = 4, 2, (1, 2, 3)


@dataclass(frozen=True)
class Fault:
    """The process that dies ("trainer", "keeper" or "node") when this rank's trainer (or keeper) comes to its n-th boundary."""

    what: str
    rank: int
    boundary: int


def node_of(rank: int) -> int:
    return rank * NODES // WORLD


def run(folder: Path, fault: Fault | None = None, log: Path | None = None) -> list[int]:
    """One run. Returns for each rank the newest step that it was told is kept (0: none).

    log: instead of a fault, write down the boundaries that are passed, into `<log>.<process>.<rank>`.
    """
    work = folder.parent / f"{folder.name}.work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    children: list[int] = []
    for rank in range(WORLD):
        child = os.fork()
        if child == 0:
            try:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the errors are meant
                _rank(rank, folder, work, fault, log)
                os._exit(0)
            finally:
                os._exit(3)
        children.append(child)
    wait(children, notice=0.1)
    told = [work / f"kept.{rank}" for rank in range(WORLD)]
    newest = [max(map(int, path.read_text().split()), default=0) if path.exists() else 0 for path in told]
    shutil.rmtree(work)
    return newest


def _rank(rank: int, folder: Path, work: Path, fault: Fault | None, log: Path | None) -> None:
    os.environ[DOMAIN_VARIABLE] = f"node {node_of(rank)}"
    (work / f"trainer.{rank}").write_text(str(os.getpid()))
    if log is not None:
        os.environ[faults.VARIABLE] = f"log:{log}.keeper.{rank}"
        faults.install(faults.scripted(f"log:{log}.trainer.{rank}"))
    elif fault is not None and fault.rank == rank:
        if fault.what == "keeper":
            os.environ[faults.VARIABLE] = f"kill:{fault.boundary}"
        else:
            faults.install(_at(fault.boundary, lambda: _strike(work, fault)))
    control = Control(rank, WORLD, FileStore(str(work / "store"), WORLD))
    checkpointer = Checkpointer(folder, control, CheckpointConfig(mode="sync", memory_every=1, timeout=60, failures=9))
    with (work / f"kept.{rank}").open("w", buffering=1) as told:
        for step in STEPS:
            checkpointer.save(step, fragments(make_arrays(step), WORLD, 5)[rank], {"step": step}, disk=False)
            keeper = checkpointer._context.memory and checkpointer._context.memory._keeper
            if keeper is not None:
                (work / f"keeper.{rank}").write_text(str(keeper._process.pid))
            for report in checkpointer.poll():
                if report.outcome == "kept":
                    told.write(f"{report.step}\n")
    os._exit(0)  # without an end: the keepers stay


def _at(count: int, act: Callable[[], None]) -> faults.Hook:
    left = count

    def hook(boundary: str, amount: int) -> int:
        nonlocal left
        left -= 1
        if left == 0:
            act()
        return amount

    return hook


def _strike(work: Path, fault: Fault) -> None:
    """Kill this process and, if its node goes, first everything else there."""
    if fault.what == "node":
        for rank in range(WORLD):
            if node_of(rank) != node_of(fault.rank):
                continue
            for process in ("keeper", "trainer"):
                path = work / f"{process}.{rank}"
                if path.exists() and int(path.read_text() or 0) not in (0, os.getpid()):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(int(path.read_text()), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def boundaries(folder: Path, work: Path) -> dict[tuple[str, int], list[str]]:
    """(process, rank) → the names of the boundaries that it passes in a run without a fault."""
    run(folder, log=work / "log")
    end_keepers(folder)
    found: dict[tuple[str, int], list[str]] = {}
    for process in ("trainer", "keeper"):
        for rank in range(WORLD):
            found[process, rank] = [line.split()[0] for line in (work / f"log.{process}.{rank}").read_text().splitlines()]
    return found


def all_faults(passed: dict[tuple[str, int], list[str]]) -> Iterator[Fault]:
    """Every boundary of every process, and of the trainers once more for the death of their node."""
    for (process, rank), names in passed.items():
        for index in range(1, len(names) + 1):
            yield Fault(process, rank, index)
            if process == "trainer":
                yield Fault("node", rank, index)


def judge(folder: Path, kept: list[int]) -> str:
    """Restore and compare. Returns what happened; raises AssertionError if a step that was kept is lost, or bits differ."""
    ranks = fragments(make_arrays(0), 1, 3, blank=True)
    try:
        report = restore(folder, ranks[0], Control.alone(), timeout=60)
    except CheckpointError as error:
        assert max(kept) == 0, f"step {max(kept)} was kept, but nothing is found: {error}"
        return "nothing had been kept"
    assert report.source == f"memory of step {report.step}", report.source
    assert report.state == {"step": report.step}
    assert holds(ranks, make_arrays(report.step)), f"step {report.step} is not what was saved"
    assert report.step >= max(kept), f"step {max(kept)} was kept, but step {report.step} was restored"
    return "the newest kept step" if report.step == max(kept) else "a step that was about to be kept"


def end_keepers(folder: Path) -> None:
    """End every keeper that is left."""
    for entry, address in registered(folder).items():
        dismiss(entry, address)
