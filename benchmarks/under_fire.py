"""Runs under fire: whole runs of 2 to 4 processes that faults strike at random, judged by what they notice and by their losses.

    python benchmarks/under_fire.py --random 200 --seed 1 --out fire.jsonl     faults drawn at random
    python benchmarks/under_fire.py --random 200 --seed 1 --only 17            one of them again, with all that was printed
    python benchmarks/under_fire.py --every-phase 4                            SIGSTOP in each phase of a step
    python benchmarks/under_fire.py --report fire.jsonl                        the tables of runs that were done

On CPU, in float64. Losses are held to a run of one process that nothing disturbs, to 1e-9. What each fault does is in
`benchmarks/fire/injector.py`, what counts as noticed in `benchmarks/fire/verdict.py`.
"""

# pyright: basic, reportMissingImports=false

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from meshloom.benchmarks.fire.faults import KINDS, Odds, Schedule, draw, every_phase
from meshloom.benchmarks.fire.report import report
from meshloom.benchmarks.fire.trial import Bench, Result, clear
from meshloom.benchmarks.fire.verdict import judge


class Undisturbed:
    """Losses of runs without faults, each made once."""

    def __init__(self, bench: Bench) -> None:
        self._bench, self._found = bench, {}

    def losses(self, schedule: Schedule) -> dict[int, float]:
        """Return step → loss, of as many steps and without the same samples."""
        key = schedule.steps, schedule.left_out
        if key not in self._found:
            with tempfile.TemporaryDirectory(prefix="meshloom-fire-") as folder:
                self._found[key] = self._bench.undisturbed(Path(folder), *key)
        return self._found[key]


def row_of(result: Result, undisturbed: dict[int, float]) -> dict:
    """Return what is kept of a run."""
    verdict, schedule = judge(result, undisturbed), result.schedule
    return {
        "number": schedule.number,
        "layout": schedule.layout.name,
        "ranks": schedule.layout.ranks,
        "words": schedule.words,
        "faults": [asdict(each) for each in schedule.faults],
        "fired": result.fired,
        "codes": result.codes,
        "hung": result.hung,
        "orphans": result.orphans,
        "seconds": round(result.seconds, 2),
        "step_seconds": result.step_seconds,
        "noticed": verdict.noticed,
        "missed": verdict.missed,
        "told": verdict.told,
        "wrong": verdict.wrong,
        "worst": verdict.worst,
        "open_end": verdict.open_end,
        "incidents": result.incidents,
        "losses": result.losses,
        "undisturbed": undisturbed,
    }


def run_all(schedules: Sequence[Schedule], lanes: int, out: Path, *, verbose: bool) -> None:
    """Run schedules, so many at a time, and write a line for each."""
    bench = Bench()
    children = []
    for lane in range(lanes):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                run_lane(bench, schedules[lane::lanes], out, verbose=verbose)
                code = 0
            except Exception:
                traceback.print_exc()
            os._exit(code)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    if any(codes):
        raise SystemExit("a lane of the bench has failed")


def run_lane(bench: Bench, schedules: Sequence[Schedule], out: Path, *, verbose: bool) -> None:
    """Run schedules one after another."""
    undisturbed = Undisturbed(bench)
    for schedule in schedules:
        folder = Path(tempfile.mkdtemp(prefix="meshloom-fire-", dir="/dev/shm"))
        try:
            result = bench.run(schedule, folder)
            row = row_of(result, undisturbed.losses(schedule))
        finally:
            clear(folder)
        with out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        row = json.loads(json.dumps(row))
        print(line_of(row), flush=True)
        if verbose or is_odd(row):
            print(f"{line_of(row)}\n{result.said}", file=sys.stderr, flush=True)


def is_odd(row: dict) -> bool:
    """Return whether a run is one to be looked at."""
    unsaid = [n for n in row["missed"] if not row["faults"][n]["kind"].startswith("flip")]
    return bool(row["wrong"] or unsaid or row["hung"] or row["orphans"]) or (row["worst"] > 1e-9 and not row["missed"])


def line_of(row: dict) -> str:
    """Return a run in one line."""
    fired = {int(n) for n in row["fired"]}
    faults = "; ".join(
        f"{each['kind']} of rank {each['rank']} in {each['phase']} of step {each['step']}"
        + ("" if n in fired else " (not met)")
        for n, each in enumerate(row["faults"])
    )
    said = f"noticed {len(row['noticed'])} of {len(fired)}, worst {row['worst']:.1e}, codes {row['codes']}"
    odd = f" ODD wrong={row['wrong']} hung={row['hung']} orphans={row['orphans']}" if is_odd(row) else ""
    return f"{row['number']}: {row['layout']} on {row['ranks']}: {faults}: {said}, {row['seconds']} s{odd}"


def main() -> None:
    """Run what was asked for, and print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--random", type=int, default=0, help="so many schedules drawn at random")
    parser.add_argument("--first", type=int, default=0, help="number of the first of them")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", type=int, help="the schedule of this number alone")
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), help="kinds of faults to draw from")
    parser.add_argument("--every-phase", type=int, default=0, help="one fault in each phase of a step, so many times")
    parser.add_argument("--kind", default="stop", help="of that fault")
    parser.add_argument("--lanes", type=int, default=1, help="runs at a time")
    parser.add_argument("--out", type=Path, help="file to which a line is written for each run")
    parser.add_argument("--report", type=Path, nargs="*", help="print the tables of these files")
    arguments = parser.parse_args()
    files = arguments.report
    if not files:
        odds = Odds({kind: weight for kind, weight in Odds().weights.items() if kind in arguments.kinds})
        numbers = [arguments.only] if arguments.only is not None else range(arguments.first, arguments.first + arguments.random)
        schedules = [draw(arguments.seed, number, odds) for number in numbers]
        if arguments.every_phase:
            schedules = list(every_phase(arguments.every_phase, arguments.kind))
        out = arguments.out or Path(tempfile.mkdtemp(prefix="meshloom-fire-")) / "runs.jsonl"
        began = time.monotonic()
        run_all(schedules, arguments.lanes, out, verbose=arguments.only is not None)
        print(f"\n{len(schedules)} runs in {time.monotonic() - began:.0f} s on {len(os.sched_getaffinity(0))} cores; {out}")
        files = [out]
    print(report([json.loads(line) for path in files for line in path.read_text().splitlines()]))


if __name__ == "__main__":
    main()
