"""The record of a run under fire, one JSON object a line. It has facts only; the judgement is made when it is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from .faults import Fault, Layout, Schedule


@dataclass
class Result:
    """The record of a run under fire.

    codes        exit code of each launcher, in order; None: it was killed
    losses       step → loss, of the newest row of each step
    undisturbed  the same of a run on one process without faults
    fired        number of a fault → what it left when it struck
    incidents    lines of incidents.jsonl
    orphans      ranks that were left a while after their launcher had ended
    outlived     longest time in seconds for which a rank outlived its launcher
    hung         whether the run had to be ended by the bench
    said         what was printed; it is not kept
    """

    schedule: Schedule
    codes: list[int | None] = field(default_factory=list[int | None])
    losses: dict[int, float] = field(default_factory=dict[int, float])
    undisturbed: dict[int, float] = field(default_factory=dict[int, float])
    fired: dict[int, dict[str, Any]] = field(default_factory=dict[int, dict[str, Any]])
    incidents: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    step_seconds: float = 0.0
    orphans: int = 0
    outlived: float = 0.0
    hung: bool = False
    seconds: float = 0.0
    said: str = ""


KEPT = ("codes", "losses", "undisturbed", "fired", "incidents", "step_seconds", "orphans", "outlived", "hung", "seconds")
NUMBERED = ("losses", "undisturbed", "fired")


def to_row(result: Result) -> dict[str, Any]:
    """Return the record of a run as JSON values, without what it said."""
    schedule = result.schedule
    return {
        "number": schedule.number,
        "layout": asdict(schedule.layout),
        "words": schedule.words,
        "faults": [asdict(each) for each in schedule.faults],
        **{name: getattr(result, name) for name in KEPT},
    }


def from_row(row: Mapping[str, Any]) -> Result:
    """Return the run of which a row was kept."""
    faults = tuple(Fault(**each) for each in row["faults"])
    values: dict[str, Any] = {**row["layout"], "words": tuple(row["layout"]["words"])}
    layout = Layout(**values)
    schedule = Schedule(row["number"], layout, faults, tuple(row["words"]))
    values = {name: {int(n): each for n, each in row[name].items()} if name in NUMBERED else row[name] for name in KEPT}
    return Result(schedule, **values)
