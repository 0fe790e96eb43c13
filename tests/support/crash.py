"""The crash lab: runs that save while something breaks, and the judgement of what is left on the disk.

A run has two ranks, each a process forked from this one. It finds steps 1 and 2 on the disk and saves steps 3 and 4,
keeping two. One process of it (a rank, or the writer of a rank) is struck at one boundary: killed, or given an error or a
short write. When a rank dies the others are ended, as a launcher does. Then the judge, in this process, restores.

The invariant: what is restored is bit-equal to one step that was saved, no older than any step reported as committed, and
the next run can save again. Nothing may be wrong silently.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch.distributed import FileStore

from meshloom.checkpoint import faults
from meshloom.checkpoint.checkpointer import Checkpointer
from meshloom.checkpoint.config import CheckpointConfig
from meshloom.checkpoint.control import Control
from meshloom.checkpoint.errors import CheckpointError, DamageError
from meshloom.checkpoint.files import open_files
from meshloom.checkpoint.folder import load_manifest, step_of
from meshloom.checkpoint.restore import restore
from meshloom.checkpoint.saving import commit
from meshloom.checkpoint.tools import verify
from support.checkpoint_worlds import Arrays, fragments, holds, make_arrays

WORLD = 2
KEEP = 2


def values_of(step: int) -> Arrays:
    """The arrays that every run has at this step."""
    return make_arrays(step)


@dataclass(frozen=True)
class Fault:
    """Strike the n-th boundary that a process passes: the rank itself (`process` "rank") or its writer ("writer")."""

    kind: str
    rank: int
    process: str
    boundary: int


def prepare(folder: Path) -> None:
    """A folder with steps 1 and 2, saved by two ranks."""
    run(folder, steps=(1, 2), mode="sync")


def run(
    folder: Path,
    fault: Fault | None = None,
    *,
    steps: tuple[int, ...] = (3, 4),
    mode: str = "sync",
    files: str = "rank",
    log: Path | None = None,
) -> list[dict[int, str]]:
    """One run. Returns, for each rank, step → outcome as far as it could tell (empty if it died).

    log: instead of a fault, write down the boundaries that are passed, into `<log>.<process>.<rank>`.
    """
    work = folder.parent / f"{folder.name}.work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    config = CheckpointConfig(mode=mode, files=files, keep=KEEP, timeout=30.0, failures=9)
    children = [_fork(lambda rank=rank: _rank(rank, folder, work, fault, steps, config, log)) for rank in range(WORLD)]
    wait(children)
    outcomes: list[dict[int, str]] = []
    for rank in range(WORLD):
        path = work / f"outcome.{rank}"
        text = path.read_text().splitlines() if path.exists() else []
        outcomes.append({int(line.split()[0]): line.split()[1] for line in text})
    shutil.rmtree(work)
    return outcomes


def _fork(body: Callable[[], None]) -> int:
    child = os.fork()
    if child == 0:
        try:
            os.close(2)  # the errors are meant
            os.open(os.devnull, os.O_WRONLY)
            body()
        except BaseException:
            os._exit(3)
        os._exit(0)
    return child


def wait(children: list[int], notice: float = 0.0) -> None:
    """Until all have ended; a killed one takes the others with it, as a launcher does `notice` seconds later."""
    left = set(children)
    deadline = time.monotonic() + 150
    while left:
        for child in list(left):
            done, status = os.waitpid(child, os.WNOHANG)
            if not done:
                continue
            left.discard(child)
            if os.WIFSIGNALED(status):
                time.sleep(notice)
                for other in left:
                    os.kill(other, signal.SIGKILL)
        if time.monotonic() > deadline:
            for other in left:
                os.kill(other, signal.SIGKILL)
            raise AssertionError("a run of the crash lab hangs")
        time.sleep(0.002)


def _rank(
    rank: int, folder: Path, work: Path, fault: Fault | None, steps: tuple[int, ...], config: CheckpointConfig, log: Path | None
) -> None:
    scripts: dict[str, str] = {}
    if log is not None:
        scripts = {process: f"log:{log}.{process}.{rank}" for process in ("rank", "writer")}
    elif fault is not None and fault.rank == rank:
        scripts = {fault.process: f"{fault.kind}:{fault.boundary}"}
    if "writer" in scripts:
        os.environ[faults.VARIABLE] = scripts["writer"]
    if "rank" in scripts:
        faults.install(faults.scripted(scripts["rank"]))
    control = Control(rank, WORLD, FileStore(str(work / "store"), WORLD))
    checkpointer = Checkpointer(folder, control, config)
    with (work / f"outcome.{rank}").open("w", buffering=1) as told:

        def tell(reports: list[object]) -> None:
            for report in reports:
                told.write(f"{report.step} {report.outcome}\n")  # type: ignore[attr-defined]

        for step in steps:
            checkpointer.save(step, fragments(values_of(step), WORLD, 7)[rank], {"step": step}, required=True)
            checkpointer.before_update()
            tell(checkpointer.poll())  # type: ignore[arg-type]
        tell(checkpointer.finish())  # type: ignore[arg-type]


def boundaries(folder: Path, mode: str, work: Path, files: str = "rank") -> dict[tuple[str, int], list[str]]:
    """(process, rank) → the names of the boundaries that it passes in a run without a fault."""
    run(folder, mode=mode, files=files, log=work / f"log-{mode}")
    found: dict[tuple[str, int], list[str]] = {}
    for process in ("rank", "writer"):
        for rank in range(WORLD):
            path = work / f"log-{mode}.{process}.{rank}"
            if path.exists():
                found[process, rank] = [line.split()[0] for line in path.read_text().splitlines()]
    return found


def judge(folder: Path, outcomes: list[dict[int, str]], *, go_on: bool = True) -> str:
    """Restore and compare. Returns what happened ("step 3"); raises AssertionError if anything is wrong silently.

    go_on: also see that the next run can save and clears what was left.
    """
    ranks = fragments(values_of(0), 1, 3, blank=True)
    report = restore(folder, ranks[0], Control.alone())
    assert report.state == {"step": report.step}, f"state of another step: {report.state}"
    assert holds(ranks, values_of(report.step)), f"step {report.step} is not what was saved"
    told = [step for outcome in outcomes for step, what in outcome.items() if what == "committed"]
    floor = max([2, *told])
    assert report.step >= floor, f"step {floor} was reported as committed, but step {report.step} was restored"
    for entry in folder.iterdir():
        if step_of(entry.name) is not None:
            faults_found = [found for found in verify(open_files(entry)) if not isinstance(found, int)]
            assert not faults_found, f"damage under a step's name: {faults_found}"
    if go_on:
        again = run(folder, steps=(5,), mode="sync")
        assert all(outcome == {5: "committed"} for outcome in again), f"the next run can't save: {again}"
        assert not [entry.name for entry in folder.iterdir() if ".tmp-" in entry.name or ".deleted-" in entry.name]
    return f"step {report.step}"


@dataclass(frozen=True)
class Damage:
    """Something done to a finished folder. `apply` returns the file it touched, or None if nothing is to be noticed."""

    name: str
    apply: Callable[[Path], Path | None]


def flip(file: str, position: float, bit: int = 0) -> Damage:
    """One bit of a file of step 4, at a fraction of its length."""

    def apply(folder: Path) -> Path:
        path = folder / "step-00000004" / file
        data = bytearray(path.read_bytes())
        at = min(int(position * len(data)), len(data) - 1)
        data[at] ^= 1 << bit
        path.write_bytes(data)
        return None if _fills_a_page(path, at) else path

    return Damage(f"bit flip in {file}", apply)


def _fills_a_page(path: Path, at: int) -> bool:
    """Return whether a byte of a host's file is one of the zeros behind a segment, which nobody needs."""
    if path.suffix != ".segments":
        return False
    manifest = load_manifest(open_files(path.parent))
    ends = [(file.digests_start + manifest.leaves_bytes(file), manifest.segment_end(file)) for file in manifest.files]
    return any(low <= at < high for low, high in ends)


def cut(file: str, position: float) -> Damage:
    """A file of step 4 cut off at a fraction of its length."""

    def apply(folder: Path) -> Path:
        path = folder / "step-00000004" / file
        os.truncate(path, min(int(position * path.stat().st_size), path.stat().st_size - 1))
        return path

    return Damage(f"truncation of {file}", apply)


def zero_tail(file: str, position: float) -> Damage:
    """The end of a file of step 4 overwritten with zeros, its length kept: what a crash of the file system can leave."""

    def apply(folder: Path) -> Path:
        path = folder / "step-00000004" / file
        data = path.read_bytes()
        kept = min(int(position * len(data)), len(data) - 1)
        path.write_bytes(data[:kept] + bytes(len(data) - kept))
        return path if data[kept:].strip(b"\0") else None

    return Damage(f"zeroed tail of {file}", apply)


def remove(file: str) -> Damage:
    """A file of step 4 gone."""

    def apply(folder: Path) -> Path:
        path = folder / "step-00000004" / file
        path.unlink()
        return path

    return Damage(f"missing {file}", apply)


def stale(file: str) -> Damage:
    """A file of step 4 replaced by the one of step 3."""

    def apply(folder: Path) -> Path:
        path = folder / "step-00000004" / file
        shutil.copyfile(folder / "step-00000003" / file, path)
        return path

    return Damage(f"stale {file}", apply)


def swap() -> Damage:
    """The two ranks' files exchanged."""

    def apply(folder: Path) -> Path:
        step = folder / "step-00000004"
        one, other = step / "rank-00000.safetensors", step / "rank-00001.safetensors"
        one.rename(step / "aside")
        other.rename(one)
        (step / "aside").rename(other)
        return one

    return Damage("swapped rank files", apply)


def lost_rename() -> Damage:
    """The rename that committed step 4 never reached the disk."""

    def apply(folder: Path) -> Path:
        (folder / "step-00000004").rename(folder / "step-00000004.tmp-0123456789ab")
        return folder / "step-00000004/manifest.json"

    return Damage("lost rename", apply)


def judge_damage(folder: Path, damage: Damage) -> str:
    """Restore step 4 after the damage: it must be refused naming the file; and the folder must give step 3, bit-equal."""
    touched = damage.apply(folder)
    ranks = fragments(values_of(0), 1, 3, blank=True)
    try:
        restore(folder / "step-00000004", ranks[0], Control.alone())
        assert touched is None, f"{damage.name}: restored as if nothing had happened"
        assert holds(ranks, values_of(4))
        return "unharmed"
    except DamageError as error:
        assert touched is not None
        assert error.file == str(touched) or error.file.startswith(str(touched.parent)), (
            f"{error.file} is blamed, not {touched}"
        )
        if "its bytes do not match" in error.what:
            assert error.block is not None, "no block is named"
    assert all(bool((f.tensor == 77).all()) for f in ranks[0]), "a refused restore has touched a tensor"
    report = restore(folder, ranks[0], Control.alone())
    assert report.step == 3
    assert holds(ranks, values_of(3))
    return "refused, step 3 instead"


def two_runs(folder: Path, locked: bool) -> str:
    """Two runs of one rank save different values of the same steps into one folder at the same time.

    locked: the second must be refused. Otherwise (a file system without locks) each step must be wholly one run's.
    """
    marks = [folder.parent / f"{folder.name}.run{number}" for number in range(2)]

    def body(number: int) -> None:
        if not locked:
            commit.FolderLock = lambda _: types.SimpleNamespace(release=lambda: None, check=lambda: None)  # type: ignore[assignment,misc]
        try:
            checkpointer = Checkpointer(folder, Control.alone(), CheckpointConfig(mode="sync", keep=0, failures=99))
        except CheckpointError:
            marks[number].write_text("refused")
            return
        if locked:
            marks[number].write_text("saving")
            while not marks[1 - number].exists():
                time.sleep(0.002)
        for step in range(3, 8):
            arrays = make_arrays(1000 * (number + 1) + step)
            checkpointer.save(step, fragments(arrays, 1, 0)[0], {"run": number})
        checkpointer.poll()
        checkpointer.close()

    wait([_fork(lambda number=number: body(number)) for number in range(2)])
    told = sorted(mark.read_text() for mark in marks if mark.exists())
    for mark in marks:
        mark.unlink(missing_ok=True)
    assert not locked or told == ["refused", "saving"], told
    ranks = fragments(values_of(0), 1, 3, blank=True)
    report = restore(folder, ranks[0], Control.alone())
    if "run" in report.state:
        assert holds(ranks, make_arrays(1000 * (report.state["run"] + 1) + report.step)), "a mixture of two runs"
    else:
        assert holds(ranks, values_of(report.step))
    return json.dumps(told)
