"""The whole crash matrix: at least 1,000 injected faults, none of which may go unnoticed or cost a committed step.

    python benchmarks/checkpoint_crash.py [--quick] [--tier disk|memory] [--files rank|host]

Prints a table: kind of fault, where, how often, and what came of it. Exit code 1 if any fault broke the invariant.
"""

# pyright: basic, reportMissingImports=false

from __future__ import annotations

import argparse
import functools
import logging
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from support import crash, crash_memory
from support.crash import Damage, Fault

FILES = {
    "rank": ("rank-00000.safetensors", "rank-00001.safetensors", "rank-00000.leaves", "rank-00001.leaves"),
    "host": ("host-00000.segments",),
}


def faults_of(mode: str, passed: dict[tuple[str, int], list[str]], every: int) -> list[tuple[str, Fault]]:
    """Every boundary × process × rank, killed; the same with ENOSPC, EIO; short writes where something is written."""
    found: list[tuple[str, Fault]] = []
    for (process, rank), names in passed.items():
        for index, name in enumerate(names, 1):
            if index % every:
                continue
            where = f"{mode} {process} {rank}"
            found += [(f"{kind} | {where}", Fault(kind, rank, process, index)) for kind in ("kill", "enospc", "eio")]
            if "write" in name:
                found.append((f"short | {where}", Fault("short", rank, process, index)))
    return found


def damages(count: int, files: str) -> list[Damage]:
    """Random places in every region of every file."""
    rng = random.Random(1)
    made: list[Damage] = [crash.lost_rename(), *([crash.swap()] if files == "rank" else [])]
    for file in ("manifest.json", *FILES[files]):
        made.append(crash.remove(file))
        if file != "manifest.json":
            made.append(crash.stale(file))
        for _ in range(count):
            made.append(crash.flip(file, rng.random(), rng.randrange(8)))
        for _ in range(count // 4):
            made.append(crash.cut(file, rng.random()))
            made.append(crash.zero_tail(file, rng.random()))
    return made


Case = tuple[str, str, Callable[[Path], str]]


def disk_cases(work: Path, every: int, files: str) -> Iterator[Case]:
    """Faults of saves to the disk, and damage done to it: the row of the table, what it is, and what does it in a folder."""
    base, finished = work / "base", work / "finished"
    crash.prepare(base)
    shutil.copytree(base, finished)
    crash.run(finished, files=files)
    for mode in ("sync", "async"):
        shutil.copytree(base, work / mode)
        for row, fault in faults_of(mode, crash.boundaries(work / mode, mode, work, files), every):

            def strike(folder: Path, fault: Fault = fault, mode: str = mode) -> str:
                shutil.copytree(base, folder)
                outcomes = crash.run(folder, fault, mode=mode, files=files)
                return crash.judge(folder, outcomes, go_on=fault.boundary % 5 == 0)

            yield row, repr(fault), strike
    for damage in damages(100 // every, files):

        def spoil(folder: Path, damage: Damage = damage) -> str:
            shutil.copytree(finished, folder)
            return crash.judge_damage(folder, damage)

        yield damage.name, damage.name, spoil
    for locked in (True, False):
        row = "two runs on one folder" + ("" if locked else ", no locks")

        def run_twice(folder: Path, locked: bool = locked) -> str:
            shutil.copytree(base, folder)
            crash.two_runs(folder, locked)
            return "whole"

        for _ in range(20 // every):
            yield row, row, run_twice


def memory_cases(work: Path, every: int) -> Iterator[Case]:
    """Deaths of trainers, keepers and nodes while a run saves into memory."""
    passed = crash_memory.boundaries(work / "log" / "checkpoints", work)
    for fault in list(crash_memory.all_faults(passed))[::every]:

        def strike(folder: Path, fault: crash_memory.Fault = fault) -> str:
            kept = crash_memory.run(folder, fault)
            try:
                return crash_memory.judge(folder, kept)
            finally:
                crash_memory.end_keepers(folder)

        yield f"in-memory tier, {fault.what} killed", repr(fault), strike


def main() -> int:
    """Run the matrix."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of it")
    parser.add_argument("--tier", choices=["disk", "memory"], help="half of it")
    parser.add_argument("--files", choices=["rank", "host"], default="rank", help="checkpoint.files of the saves to the disk")
    arguments = parser.parse_args()
    every = 10 if arguments.quick else 1
    logging.disable(logging.CRITICAL)
    memory = Path("/dev/shm")
    table: Counter[tuple[str, str]] = Counter()
    broken: list[str] = []
    slow: list[tuple[float, str]] = []
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as name:
        work = Path(name)
        tiers = {"disk": functools.partial(disk_cases, files=arguments.files), "memory": memory_cases}
        chosen = [tiers[arguments.tier]] if arguments.tier else list(tiers.values())
        for number, (row, what, act) in enumerate(case for tier in chosen for case in tier(work, every)):
            folder = work / f"case{number}"
            began = time.perf_counter()
            try:
                table[row, act(folder)] += 1
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                broken.append(f"{what}: {type(error).__name__}: {error}")
                table[row, "INVARIANT BROKEN"] += 1
            slow.append((time.perf_counter() - began, what))
            shutil.rmtree(folder, ignore_errors=True)
    print("| Fault | Outcome | Count |\n|---|---|---:|")
    for (row, outcome), count in sorted(table.items()):
        print(f"| {row.replace('|', '·')} | {outcome} | {count} |")
    print(f"\n{sum(table.values())} faults in {time.perf_counter() - start:.0f} s, {len(broken)} broke the invariant")
    print("slowest:", *(f"{seconds:.1f} s {what}" for seconds, what in sorted(slow, reverse=True)[:5]), sep="\n  ")
    for line in broken:
        print(f"BROKEN {line}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
