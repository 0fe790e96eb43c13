"""The tables of runs under fire."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .rows import Result
from .verdict import Verdict, judge

STOP_STEPS, STOP_SECONDS = 3, 5
"""A stopped rank is to be told within so many usual steps and seconds."""


@dataclass(frozen=True)
class Struck:
    """A fault that has struck, and the run that it struck."""

    number: int
    result: Result
    verdict: Verdict

    @property
    def kind(self) -> str:
        """Name its row of the table: stops apart by the part of the step, flips of state by whether another rank has a copy."""
        kind = self.result.schedule.faults[self.number].kind
        if kind == "stop":
            return f"stop in {self.result.fired[self.number]['phase']}"
        if kind not in ("flip_weight", "flip_optimizer"):
            return kind
        return f"{kind}, {'copied' if self.copied else 'a single copy'}"

    @property
    def copied(self) -> bool:
        """True if another rank holds a copy of what was flipped."""
        return self.result.fired[self.number].get("copies", 1) > 1

    @property
    def in_time(self) -> bool:
        """True if it was noticed as soon as a stopped rank is to be."""
        seconds = self.verdict.noticed.get(self.number)
        return seconds is not None and seconds <= STOP_STEPS * self.verdict.usual[self.number] + STOP_SECONDS


def report(results: Sequence[Result]) -> str:
    """Return a table by kind of fault, and what holds of all runs."""
    judged = [(each, judge(each)) for each in results]
    struck = [Struck(number, result, verdict) for result, verdict in judged for number in result.fired]
    return "\n".join([*_table(struck), "", *_sums(judged, struck)])


def _table(struck: Sequence[Struck]) -> list[str]:
    lines = ["| Fault | Struck | Noticed | Median time | Longest | Losses the same |", "|---|---|---|---|---|---|"]
    for kind in sorted({each.kind for each in struck}):
        found = [each for each in struck if each.kind == kind]
        times = sorted(each.verdict.noticed[each.number] for each in found if each.number in each.verdict.noticed)
        middle, longest = (f"{times[len(times) // 2]:.1f} s", f"{times[-1]:.1f} s") if times else ("–", "–")
        same = sum(each.verdict.same for each in found)
        lines.append(f"| {kind} | {len(found)} | {len(times)} | {middle} | {longest} | {same} |")
    return lines


def _sums(judged: Sequence[tuple[Result, Verdict]], struck: Sequence[Struck]) -> list[str]:
    flips = [each for each in struck if each.kind.startswith("flip") and each.number in each.verdict.missed]
    silent = [each for each in flips if each.copied and not each.verdict.same]
    of_flips = {id(each.result) for each in flips}
    others = [result for result, verdict in judged if not (verdict.same or verdict.open_end or id(result) in of_flips)]
    missed = [each for each in struck if each.number in each.verdict.missed and not each.kind.startswith("flip")]
    stops = [each for each in struck if each.kind.startswith("stop")]
    return [
        f"{len(judged)} runs, {len(struck)} faults that struck",
        f"runs with the losses of an undisturbed run: {sum(verdict.same for _, verdict in judged)}",
        f"runs with others, and no missed flip to explain them: {len(others)} {[each.schedule.number for each in others]}",
        f"ended by their own decision: {sum(verdict.open_end for _, verdict in judged)}",
        f"wrong ranks named: {sum(len(verdict.wrong) for _, verdict in judged)}",
        f"not noticed, apart from flips: {len(missed)} {[(each.kind, each.result.schedule.number) for each in missed]}",
        f"flips in copied state that were not noticed, and changed losses: {len(silent)}",
        f"stops told within {STOP_STEPS} usual steps + {STOP_SECONDS} s: {sum(each.in_time for each in stops)} of {len(stops)}",
        f"runs that hung: {sum(result.hung for result, _ in judged)}",
        f"ranks left a while after their launcher: {sum(result.orphans for result, _ in judged)};"
        f" longest life after it: {max((result.outlived for result, _ in judged), default=0.0):.1f} s",
        f"ranks named as slow that no fault had slowed: {sum(len(verdict.slowed) for _, verdict in judged)}",
    ]
