"""Read figures from what a command has printed, for `several_gpus.py`: name → number. What is not there is left out."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterator
from typing import Any

Numbers = dict[str, float]

TESTS = re.compile(r"(\d+) (passed|failed|errors?|skipped)\b")
FAULTS = re.compile(r"(\d+) wrong or missing names; (\d+) of the stops ended later")
FIRE = re.compile(r"losses (\S+) apart")
SAVES = re.compile(r"^(none|disk|memory): ([\d,]+) tokens/s/GPU, median step \S+ ms, mean ([+-][\d.]+) %", re.M)
STALL = re.compile(r"save of step \d+: .*?stall_seconds (\S+)")
APART = re.compile(r"^(loss|eval_loss): .* over the first 10: (\S+), over all: (\S+)", re.M)


def nothing(_said: str) -> Numbers:
    """Read nothing: that the command ends with 0 is all that is asked."""
    return {}


def beside(said: str) -> Numbers:
    """Read `beside_torchtitan.py`: of each system tokens/s/GPU, GiB held, and seconds to the first loss."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for line in _json_lines(said):
        if "rate" in line:
            runs.setdefault(line["system"], []).append(line)
    found: Numbers = {}
    for system, rows in runs.items():
        found[system] = statistics.median(row["rate"] for row in rows)
        found[f"{system} GiB"] = statistics.median(row["reserved"] for row in rows)
        found[f"{system} first loss"] = rows[0]["first_step"]
    return found


def ranks(said: str) -> Numbers:
    """Read `packed_documents.py part=ranks`: tokens/s/GPU by lengths of documents, and GiB beside the allocator's at most."""
    found: Numbers = {}
    for line in _json_lines(said):
        if "tokens_per_second_per_gpu" in line and "rank" not in line:
            found[line["lengths"]] = line["tokens_per_second_per_gpu"]
        if line.get("other_gib") is not None:
            found["other GiB"] = max(found.get("other GiB", 0.0), line["other_gib"])
    return found


def tests(said: str) -> Numbers:
    """Read pytest's last line."""
    last = said.rstrip().rpartition("\n")[2]
    counts = {what.rstrip("s"): float(count) for count, what in TESTS.findall(last)}
    return {"passed": 0.0, "failed": 0.0, **counts} if counts else {}


def faults(said: str) -> Numbers:
    """Read `run_faults.py`; `collectives`: lines in which the flight recorder has named a collective."""
    if (found := FAULTS.search(said)) is None:
        return {}
    collectives = sum("not joined by rank" in line for line in said.splitlines())
    return {"wrong names": float(found[1]), "late ends": float(found[2]), "collectives": float(collectives)}


def fire(said: str) -> Numbers:
    """Read the runs of `under_fire.py`."""
    runs = [line for line in said.splitlines() if FIRE.search(line)]
    if not runs:
        return {}
    marks = {"noticed": "(noticed)", "struck": "(struck)", "wrong names": " WRONG ", "hung": " HUNG"}
    worst = max(float(FIRE.findall(line)[0]) for line in runs)
    return {"runs": float(len(runs)), "apart": worst} | {
        name: float(sum(mark in line for line in runs)) for name, mark in marks.items()
    }


def saves(said: str) -> Numbers:
    """Read `checkpoint_throughput.py`: of the last phase of each kind tokens/s/GPU and the mean step's loss in percent."""
    found: Numbers = {}
    for phase, rate, loss in SAVES.findall(said):
        found |= {phase: float(rate.replace(",", "")), f"{phase} %": float(loss)}
    stalls = [float(seconds) for seconds in STALL.findall(said)]
    return found | ({"stall": max(stalls)} if stalls else {})


def apart(said: str) -> Numbers:
    """Read `compare_runs.py`: the largest relative difference of a loss over the first 10 steps, and over all, of any run."""
    found = [(float(first), float(every)) for key, first, every in APART.findall(said) if key == "loss"]
    return {"first 10": max(first for first, _ in found), "all": max(every for _, every in found)} if found else {}


def against(said: str) -> Numbers:
    """Read `meshloom plan --against … --json`: predicted and measured tokens/s/GPU."""
    start = said.find("{")
    if start < 0:
        return {}
    told, _ = json.JSONDecoder().raw_decode(said[start:])
    predicted, measured = told["predicted"], told["measured"]
    numbers = {
        "predicted": predicted["tokens_per_second_per_gpu"],
        "measured": measured["tokens_per_second"],
        "predicted GiB": predicted["gib"]["at_most"],
        "measured GiB": measured["memory"],
    }
    return {name: float(number) for name, number in numbers.items() if number is not None}


def _json_lines(said: str) -> Iterator[dict[str, Any]]:
    for line in said.splitlines():
        if line.startswith("{"):
            try:
                yield json.loads(line)
            except ValueError:  # the line it was stopped in
                continue
