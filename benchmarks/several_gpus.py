"""Measure what is to be known about 2, 4 or 8 GPUs of one host, row by row; go on where the last call ended.

    python benchmarks/several_gpus.py gpus=2 dry=1                                the commands of every row; starts nothing
    python benchmarks/several_gpus.py gpus=2 tiny=1 output=tried                  every row's commands small, on CPU processes
    python benchmarks/several_gpus.py gpus=8 seconds=540 output=found newer=…     rows until 540 s are over, and their table
    python benchmarks/several_gpus.py gpus=8 output=found only=tp2,saves          these alone, also if they are done

Rows, their questions and goals are in `several_rows.py`. A row that is in `output`/rows.jsonl, for as many GPUs, is not run
again unless `only` names it. One that would not fit into the seconds that are left, by its estimate, is left for the next call,
and shorter ones behind it are tried. A row's processes are ended when it takes twice its estimate, or the time is over. What it
said is kept in a folder of its own; its line in rows.jsonl has its figures. torchtitan 0.2.2 runs beside where it is installed,
0.3.0 where `newer`, a folder, holds it (`beside_torchtitan.py`). With tiny=1 only ours runs, at sizes that say nothing about
speed.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from arguments import read
from processes import end
from several_figures import Numbers
from several_rows import Goal, Place, Row, all_rows

ROOT = Path(__file__).parents[1]
MODULES = {"meshloom": "meshloom.launch.cli", "torchrun": "torch.distributed.run", "pytest": "pytest"}
PATIENCE = 2.0
"""A row may take so many times its estimate."""
TINY_SECONDS = 60.0
CUT = "cut by the end of the call: to be run again"
"""The end of a row that took longer than its estimate, so that the call's time did not suffice."""
Found = Mapping[str, Mapping[str, Any]]
"""Row → its newest line in rows.jsonl."""


@dataclass
class Settings:
    """One call. seconds: of it; only: names of rows, with commas; newer: folder of torchtitan 0.3.0."""

    gpus: int = 2
    seconds: float = 540.0
    output: str = "several_gpus"
    only: str = ""
    newer: str = ""
    dry: int = 0
    tiny: int = 0


def main() -> int:
    """Run rows and print the table. Return 1 if a row of this call has failed."""
    began = time.monotonic()
    settings = read(Settings(), sys.argv[1:])
    if settings.gpus not in (2, 4, 8):
        raise SystemExit(f"gpus={settings.gpus}: rows are of 2, 4 or 8")
    output = Path(settings.output).resolve()
    newer = str(Path(settings.newer).resolve()) if settings.newer else ""
    place = Place(settings.gpus, output, bool(settings.tiny), newer)
    rows = all_rows(place)
    only = [name for name in settings.only.split(",") if name]
    if unknown := set(only) - {row.name for row in rows}:
        raise SystemExit(f"there is no row {', '.join(sorted(unknown))}; rows are {', '.join(row.name for row in rows)}")
    if settings.dry:
        for row in rows:
            if not only or row.name in only:
                print(f"# {row.name}, about {row.seconds:.0f} s: {row.question}")
                print(*(shlex.join(command.words) for command in row.commands), sep="\n")
        return 0
    failed = False
    for row in rows:
        left = settings.seconds - (time.monotonic() - began)
        if row.name not in only if only else lines_of(place).get(row.name, {"ended": CUT})["ended"] != CUT:
            continue
        if (needed := TINY_SECONDS if settings.tiny else row.seconds) > left:
            print(f"# {row.name} is left for the next call: about {needed:.0f} s, and {left:.0f} are left", flush=True)
            continue
        line = run_row(row, place, left if settings.tiny else min(left, PATIENCE * row.seconds))
        if line["ended"].startswith("stopped") and time.monotonic() - began >= settings.seconds:
            line["ended"] = CUT
        failed |= line["ended"] != "done"
        with (output / "rows.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)
    print(table(rows, lines_of(place), place))
    return int(failed)


def lines_of(place: Place) -> dict[str, dict[str, Any]]:
    """Return the newest line of each row for as many GPUs."""
    file = place.output / "rows.jsonl"
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []
    return {line["row"]: line for line in lines if (line["gpus"], line["tiny"]) == (place.gpus, place.tiny)}


def run_row(row: Row, place: Place, seconds: float) -> dict[str, Any]:
    """Run a row's commands one after another, and read their figures; the first that fails ends it. Return its line.

    A row whose first goal has no number has failed, too.
    """
    folder = place.folder(row.name)
    shutil.rmtree(folder, ignore_errors=True)  # a run there would be resumed
    folder.mkdir(parents=True)
    began, ended = time.monotonic(), "done"
    numbers: Numbers = {}
    for number, command in enumerate(row.commands):
        log, start = folder / f"{number}.log", time.monotonic()
        code = run_command(command.words, log, place, seconds - (start - began))
        found = command.read(log.read_text(encoding="utf-8", errors="replace"))
        if command.label:
            found["seconds"] = time.monotonic() - start
        numbers |= {f"{command.label}{name}": value for name, value in found.items() if math.isfinite(value)}
        if code != 0:
            ended = f"stopped in {log.name}" if code is None else f"failed with {code} in {log.name}"
            break
    if ended == "done" and row.goals and row.goals[0].number not in numbers:  # beside_torchtitan.py goes on where ours fails
        ended = f"without '{row.goals[0].number}' in its logs"
    made = {"commit": commit(), "torch": version("torch"), "time": time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())}
    place_of = {"row": row.name, "gpus": place.gpus, "tiny": place.tiny}
    return {**place_of, "ended": ended, "seconds": round(time.monotonic() - began, 1), "numbers": numbers, **made}


def run_command(words: Sequence[str], log: Path, place: Place, seconds: float) -> int | None:
    """Run a command at the root of the repository. Return its exit code; None: its time was over. log: for what it says."""
    first, *rest = words
    start = [sys.executable, *(["-m", MODULES[first]] if first in MODULES else [])]
    # Rates that were calibrated, and what other programs need not compile again, stay with the rows.
    variables = {**os.environ, "PYTHONUNBUFFERED": "1", "MESHLOOM_CACHE": str(place.output / "cache")}
    with log.open("w", encoding="utf-8") as file:
        print("$", shlex.join(words), file=file, flush=True)
        process = subprocess.Popen(
            [*start, *rest], cwd=ROOT, env=variables, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
        )
        try:
            return process.wait(max(1.0, seconds))
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:  # after Ctrl-C, too, which does not reach a session of its own
                end(process)


def commit() -> str:
    """Return the commit of this checkout; "" where there is no git."""
    if shutil.which("git") is None:
        return ""
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return found.stdout.strip()


def value_of(goal: Goal, row: Row, found: Found) -> float | None:
    """Return the figure that a goal is about; None where a number of it is not there."""

    def number(name: str) -> float | None:
        other, _, own = name.rpartition("/")
        return found.get(other or row.name, {}).get("numbers", {}).get(own)

    value, over = number(goal.number), number(goal.over) if goal.over else goal.by
    return None if value is None or not over else value / over


def judged(goal: Goal, value: float) -> str:
    """Return what a goal asks for, and whether it is met."""
    asked = [f"{sign} {limit:g}" for sign, limit in (("≥", goal.least), ("≤", goal.most)) if limit is not None]
    met = (goal.least is None or value >= goal.least) and (goal.most is None or value <= goal.most)
    return f"{' and '.join(asked)}: {'met' if met else '**missed**'}" if asked else ""


def shown(value: float) -> str:
    """Return a number as it stands in the table."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:.4g}"


def table(rows: Sequence[Row], found: Found, place: Place) -> str:
    """Return a Markdown table of all rows: figures with their goals, and what has not been run."""
    told = "processes, **tiny sizes: they say nothing about speed**" if place.tiny else "GPUs"
    lines = [f"{place.gpus} {told}", "", "| Row | Figure | Value | Goal |", "|---|---|---:|---|"]
    for row in rows:
        line = found.get(row.name)
        ended = "not run" if line is None else "" if line["ended"] == "done" else line["ended"]
        lines.append(f"| **{row.name}** | {row.question} | {ended} | |")
        for goal in row.goals if line is not None else ():
            if (value := value_of(goal, row, found)) is not None:
                lines.append(f"| | {goal.name} | {shown(value)} | {'' if place.tiny else judged(goal, value)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
