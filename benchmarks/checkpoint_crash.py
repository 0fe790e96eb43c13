"""The whole crash matrix: at least 1,000 injected faults, none of which may go unnoticed or cost a committed step.

    python benchmarks/checkpoint_crash.py [--quick]

Prints a table: kind of fault, where, how often, and what came of it. Exit code 1 if any fault broke the invariant.
"""

from __future__ import annotations

import argparse
import logging
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import crash
from crash import Damage, Fault

FILES = ("manifest.json", "rank-00000.safetensors", "rank-00001.safetensors", "rank-00000.leaves", "rank-00001.leaves")


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


def damages(count: int) -> list[Damage]:
    """Random places in every region of every file."""
    rng = random.Random(1)
    made: list[Damage] = [crash.swap(), crash.lost_rename()]
    for file in FILES:
        made.append(crash.remove(file))
        if file != "manifest.json":
            made.append(crash.stale(file))
        for _ in range(count):
            made.append(crash.flip(file, rng.random(), rng.randrange(8)))
        for _ in range(count // 4):
            made.append(crash.cut(file, rng.random()))
            made.append(crash.zero_tail(file, rng.random()))
    return made


def main() -> int:
    """Run the matrix."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of it")
    every = 10 if parser.parse_args().quick else 1
    logging.disable(logging.CRITICAL)
    memory = Path("/dev/shm")
    table: Counter[tuple[str, str]] = Counter()
    broken: list[str] = []
    slow: list[tuple[float, str]] = []
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as name:
        work = Path(name)
        base, finished = work / "base", work / "finished"
        crash.prepare(base)
        shutil.copytree(base, finished)
        crash.run(finished)
        cases: list[tuple[str, str, Path, Callable[[Path], str]]] = []
        for mode in ("sync", "async"):
            shutil.copytree(base, work / mode)
            for row, fault in faults_of(mode, crash.boundaries(work / mode, mode, work), every):

                def strike(folder: Path, fault: Fault = fault, mode: str = mode) -> str:
                    return crash.judge(folder, crash.run(folder, fault, mode=mode), go_on=fault.boundary % 5 == 0)

                cases.append((row, repr(fault), base, strike))
        for damage in damages(100 // every):
            cases.append((damage.name, damage.name, finished, lambda folder, damage=damage: crash.judge_damage(folder, damage)))
        for locked in (True, False):
            for _ in range(20 // every):
                row = "two runs on one folder" + ("" if locked else ", no locks")
                cases.append((row, row, base, lambda folder, locked=locked: "whole" if crash.two_runs(folder, locked) else ""))
        for number, (row, what, origin, act) in enumerate(cases):
            folder = work / f"case{number}"
            shutil.copytree(origin, folder)
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
