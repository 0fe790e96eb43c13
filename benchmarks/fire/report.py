"""The tables of runs under fire."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def report(rows: Sequence[dict[str, Any]]) -> str:
    """Return a table by kind of fault, and what holds of all runs."""
    lines = [
        "| Fault | Struck | Noticed | Median time | Longest | Losses the same |",
        "|---|---|---|---|---|---|",
    ]
    by_kind: dict[str, list[tuple[dict[str, Any], int]]] = {}
    for row in rows:
        for number in row["fired"]:
            by_kind.setdefault(_kind(row, int(number)), []).append((row, int(number)))
    for kind, found in sorted(by_kind.items()):
        times = sorted(float(row["noticed"][str(n)]) for row, n in found if str(n) in row["noticed"])
        same = sum(row["worst"] <= 1e-9 for row, _ in found)
        middle, longest = (f"{times[len(times) // 2]:.1f} s", f"{times[-1]:.1f} s") if times else ("–", "–")
        lines.append(f"| {kind} | {len(found)} | {len(times)} | {middle} | {longest} | {same} |")
    wrong, hung = sum(len(row["wrong"]) for row in rows), sum(row["hung"] for row in rows)
    orphans, same = sum(row["orphans"] for row in rows), sum(row["worst"] <= 1e-9 for row in rows)
    ended = sum(row["open_end"] for row in rows)
    struck = sum(len(row["fired"]) for row in rows)
    lines += [
        "",
        f"{len(rows)} runs, {struck} faults; losses of an undisturbed run: {same} runs; ended by their own decision: {ended};",
        f"wrong ranks named: {wrong}; runs that hung: {hung}; ranks that outlived their launcher: {orphans}",
    ]
    return "\n".join(lines)


def _kind(row: dict[str, Any], number: int) -> str:
    """Return what a fault counts as: flips of state are told apart by whether another rank holds a copy."""
    kind = row["faults"][number]["kind"]
    if kind in ("flip_weight", "flip_optimizer"):
        copies = row["fired"][str(number)].get("copies", 1)
        return f"{kind}, {'copied' if copies > 1 else 'a single copy'}"
    return kind
