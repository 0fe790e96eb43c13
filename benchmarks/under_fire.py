"""Runs under fire: whole runs of 2 to 4 processes that faults strike at random, judged by what they notice and by their losses.

    python benchmarks/under_fire.py --random 200 --seed 1 --out fire.jsonl     faults drawn at random
    python benchmarks/under_fire.py --random 200 --seed 1 --only 17            one of them again, with all that was printed
    python benchmarks/under_fire.py --every-phase 4                            SIGSTOP in each phase of a step
    python benchmarks/under_fire.py --random 6 --kinds kill_node late_node     several launchers, one of which is lost or late
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
from pathlib import Path

from meshloom.benchmarks.fire.faults import KINDS, Odds, Schedule, draw, every_phase
from meshloom.benchmarks.fire.report import report
from meshloom.benchmarks.fire.rows import Result, from_row, to_row
from meshloom.benchmarks.fire.trial import Bench, clear, left_out
from meshloom.benchmarks.fire.verdict import Verdict, judge


class Undisturbed:
    """Losses of runs without faults, each made once."""

    def __init__(self, bench: Bench) -> None:
        self._bench, self._found = bench, {}

    def losses(self, result: Result) -> dict[int, float]:
        """Return step → loss, of as many steps and without the same samples."""
        key = result.schedule.steps, left_out(result)
        if key not in self._found:
            with tempfile.TemporaryDirectory(prefix="meshloom-fire-") as folder:
                self._found[key] = self._bench.undisturbed(Path(folder), *key)
        return self._found[key]


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
            result.undisturbed = undisturbed.losses(result)
        finally:
            clear(folder)
        with out.open("a") as file:
            file.write(json.dumps(to_row(result)) + "\n")
        verdict = judge(result)
        print(line_of(result, verdict), flush=True)
        if verbose or verdict.wrong or result.hung or result.orphans:
            print(f"{line_of(result, verdict)}\n{result.said}", file=sys.stderr, flush=True)


def line_of(result: Result, verdict: Verdict) -> str:
    """Return a run in one line."""
    schedule = result.schedule
    faults = "; ".join(
        f"{each.kind} of rank {each.rank} in {each.phase} of step {each.step}"
        + ("" if number not in result.fired else " (noticed)" if number in verdict.noticed else " (struck)")
        for number, each in enumerate(schedule.faults)
    )
    odd = f" WRONG {verdict.wrong}" if verdict.wrong else ""
    odd += " HUNG" if result.hung else ""
    return (
        f"{schedule.number}: {schedule.layout.name} on {schedule.layout.ranks}: {faults}: losses {verdict.worst:.1e} apart,"
        f" exit codes {result.codes}, {result.seconds:.0f} s{odd}"
    )


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
    print(report([from_row(json.loads(line)) for path in files for line in path.read_text().splitlines()]))


if __name__ == "__main__":
    main()
