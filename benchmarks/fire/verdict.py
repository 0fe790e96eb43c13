"""Judge a run under fire: was each fault noticed, was the right rank named, are the losses those of an undisturbed run?

Pure functions of what the run has left behind. A fault is noticed by an incident of a kind that fits it, after it struck. An
incident names a wrong rank if no fault of a kind that fits it struck the rank that it names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from .faults import CRASHES, FLIPS, HANGS, LOST_PARENTS, NUMBERS, Fault, Schedule

SAME = 1e-9
"""Relative difference of losses in float64 up to which they are the same."""
FITS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(CRASHES, ("death", "error")),
    **dict.fromkeys(HANGS, ("hang",)),
    **dict.fromkeys((*NUMBERS, "bad_sample"), ("bad_step",)),
    **dict.fromkeys(FLIPS, ("bad_step", "replicas_differ", "replicas_judged")),
    "slow": ("straggler",),
}
"""Kind of a fault → kinds of the incidents that notice it."""
SUSPECTING = ("silence",)
"""Incidents that name a rank before anything is decided; they fit what hangs."""
OPEN_ENDS = (77,)
"""Exit codes of runs that end by their own decision; they say why."""


class Outcome(Protocol):
    """What a run has left behind: see `trial.Result`."""

    schedule: Schedule
    codes: list[int | None]
    losses: dict[int, float]
    fired: dict[int, dict[str, Any]]
    incidents: list[dict[str, Any]]
    step_seconds: float
    orphans: int
    hung: bool


@dataclass
class Verdict:
    """The judgement on a run.

    noticed   number of a fault → seconds until it was noticed, of those that were
    missed    faults that struck and were not noticed, though incidents of their kind are to be expected
    wrong     incidents that name a rank that no fitting fault has struck
    worst     largest relative difference of a loss from the undisturbed run's; infinite: a step is missing
    told      the message by which each fault was noticed
    open_end  whether the run ended by its own decision, so that steps are missing
    """

    noticed: dict[int, float] = field(default_factory=dict)
    missed: list[int] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    worst: float = 0.0
    told: dict[int, str] = field(default_factory=dict)
    open_end: bool = False

    @property
    def same(self) -> bool:
        """True if the losses are those of the undisturbed run."""
        return self.worst <= SAME


def judge(result: Outcome, undisturbed: Mapping[int, float]) -> Verdict:
    """Judge what a run has left behind. undisturbed: step → loss, of a run without faults."""
    verdict = Verdict(open_end=bool(result.codes) and result.codes[-1] in OPEN_ENDS)
    faults = [(n, result.schedule.faults[n], left) for n, left in sorted(result.fired.items())]
    for number, fault, left in faults:
        found = next((each for each in result.incidents if _notices(each, fault, left)), None)
        if found is not None:
            verdict.noticed[number] = found["time"] - left["time"]
            verdict.told[number] = found["message"]
        elif fault.kind in FITS:
            verdict.missed.append(number)
    for incident in result.incidents:
        named = _named(incident)
        fitting = [f for _, f, left in faults if _fits(incident, f) and incident["time"] >= left["time"] - SLACK]
        if named and not any(f.kind == "bad_sample" or f.rank in named for f in fitting):
            verdict.wrong.append(incident["message"])
    steps = [step for step in undisturbed if not verdict.open_end or step in result.losses]
    verdict.worst = max((_apart(result.losses.get(step, math.nan), undisturbed[step]) for step in steps), default=math.inf)
    return verdict


SLACK = 0.05
"""Seconds by which two clocks readings of one moment may be apart."""


def _notices(incident: Mapping[str, Any], fault: Fault, left: Mapping[str, Any]) -> bool:
    if not _fits(incident, fault) or incident["time"] < left["time"] - SLACK:
        return False
    if fault.kind == "bad_sample":  # whichever rank it was dealt to
        return not incident["details"]["samples"] or int(fault.size) in incident["details"]["samples"]
    named = _named(incident)
    return not named or fault.rank in named


def _fits(incident: Mapping[str, Any], fault: Fault) -> bool:
    kinds = FITS.get(fault.kind, ())
    return incident["kind"] in kinds or (incident["kind"] in SUSPECTING and fault.kind in HANGS)


def _named(incident: Mapping[str, Any]) -> set[int]:
    """Return the ranks that an incident names; empty where it names none, or tells what is done about another."""
    details = incident.get("details") or {}
    if incident["kind"] == "replicas_differ":
        return set(details["odd"])
    if incident["kind"] == "replicas_judged":
        return set(details["wrong"])
    if incident["kind"] in ("death", "error", "hang", "silence", "straggler", "bad_step") and incident["rank"] is not None:
        return {incident["rank"]}
    return set()


def _apart(loss: float, other: float) -> float:
    """Return the relative difference of two losses; infinite where one is missing or not finite."""
    if not (math.isfinite(loss) and math.isfinite(other)):
        return math.inf
    return abs(loss - other) / abs(other)


def is_copied(fault: Fault, left: Mapping[str, Any]) -> bool:
    """Return whether a flip hit what another rank holds, too."""
    return fault.kind in ("flip_weight", "flip_optimizer") and left.get("copies", 1) > 1


def is_lost_parent(fault: Fault) -> bool:
    """Return whether a fault ends the launcher, so that somebody else has to start the run again."""
    return fault.kind in LOST_PARENTS
