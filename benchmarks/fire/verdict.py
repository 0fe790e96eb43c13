"""Judge a run under fire: was each fault noticed, was the right rank named, are the losses those of an undisturbed run?

Pure functions of what the run has left behind. A fault is noticed by an incident of a kind that fits it, after it struck. An
incident notices the last such fault; a comparison of copies notices all since the one before. It names a wrong rank if no fault
of a kind that fits it struck the rank that it names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .faults import CRASHES, ENDLESS, FLIPS, HANGS, NUMBERS, Fault
from .rows import Result

OF_STATE, OF_PASSES = FLIPS[:2], FLIPS[2:]
SAME = 1e-9
"""Relative difference of losses in float64 up to which they are the same."""
FITS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(CRASHES, ("death", "error")),
    **dict.fromkeys(HANGS, ("hang",)),
    **dict.fromkeys((*NUMBERS, "bad_sample"), ("bad_step",)),
    **dict.fromkeys(OF_STATE, ("bad_step", "replicas_differ", "replicas_judged")),
    **dict.fromkeys(OF_PASSES, ("bad_step",)),
    "slow": ("straggler",),
    "full_disk": ("save_failed", "error"),
    "kill_node": ("node_lost",),
    "kill_again": ("death",),
}
"""Kind of a fault → kinds of the incidents that notice it."""
MAY_PASS = ("full_disk",)
"""Faults that need no incident: a save that fails is told, and the next one may succeed."""
SUSPECTING = ("silence",)
"""Incidents that name a rank before the run is ended for it; they fit what hangs, and notice what is not stopped."""
DECIDING = ("death", "error", "hang", "bad_step", "replicas_differ", "straggler", "save_failed", "node_lost")
"""Incidents that notice a fault; others only tell more about it."""
OPEN_END = 77
"""Exit code of runs that end by their own decision; they say why."""
NO_PROGRESS = 76
"""Exit code of a run that is started again in vain."""


@dataclass
class Verdict:
    """The judgement on a run.

    noticed   number of a fault → seconds until it was noticed, of those that were
    missed    faults that struck and were not noticed, though incidents of their kind are to be expected
    wrong     incidents that name a rank that no fitting fault has struck
    slowed    ranks that were named as slow, and that no fault has slowed: the machine may have
    worst     largest relative difference of a loss from the undisturbed run's; infinite: a step is missing
    told      the message by which each fault was noticed
    usual     seconds of a usual step of the rank that a hang was noticed of, as the watch has learned it
    open_end  whether the run ended by its own decision, so that steps are missing
    """

    noticed: dict[int, float] = field(default_factory=dict[int, float])
    missed: list[int] = field(default_factory=list[int])
    wrong: list[str] = field(default_factory=list[str])
    slowed: list[str] = field(default_factory=list[str])
    worst: float = 0.0
    told: dict[int, str] = field(default_factory=dict[int, str])
    usual: dict[int, float] = field(default_factory=dict[int, float])
    open_end: bool = False

    @property
    def same(self) -> bool:
        """True if the losses are those of the undisturbed run."""
        return self.worst <= SAME


def judge(result: Result) -> Verdict:
    """Judge what a run has left behind."""
    undisturbed = result.undisturbed
    faults = [(n, result.schedule.faults[n], left) for n, left in sorted(result.fired.items())]
    loops = any(fault.kind in ENDLESS for _, fault, _ in faults)
    verdict = Verdict(open_end=result.codes[-1:] in ([OPEN_END], *([[NO_PROGRESS]] if loops else [])))
    for incident in _with_real_times(result):
        named = _named(incident)
        fitting = [each for each in faults if _fits(incident, each[1]) and incident["time"] >= each[2]["time"] - SLACK]
        hit = [each for each in fitting if _may_be(incident, each[1], named)]
        if named and not hit:
            (verdict.slowed if incident["kind"] == "straggler" else verdict.wrong).append(incident["message"])
        open_ = [each for each in hit if each[0] not in verdict.noticed]
        deciding = incident["kind"] in DECIDING or (incident["kind"] in SUSPECTING and hit[-1:] and hit[-1][1].kind == "hang")
        if hit and hit[-1][1].kind in ENDLESS:
            deciding = "not started again" in incident["details"].get("said", "")
        for number, _, left in open_ if incident["kind"] == "replicas_differ" else open_[-1:] if deciding else []:
            verdict.noticed[number] = incident["time"] - left["time"]
            verdict.told[number] = incident["message"]
            verdict.usual[number] = _usual_step(incident) or result.step_seconds
    verdict.missed = [
        number
        for number, fault, _ in faults
        if fault.kind in FITS and fault.kind not in MAY_PASS and number not in verdict.noticed
    ]
    steps = [step for step in undisturbed if not verdict.open_end or step in result.losses]
    verdict.worst = max((_apart(result.losses.get(step, math.nan), undisturbed[step]) for step in steps), default=math.inf)
    return verdict


def _with_real_times(result: Result) -> list[dict[str, Any]]:
    """Return the incidents, at the times at which they were: what a rank writes whose clock was set is hours off."""
    found = [dict(each) for each in result.incidents]
    for number, left in result.fired.items():
        fault = result.schedule.faults[number]
        for each in found if fault.kind == "clock" else []:
            if abs(each["time"] - left["time"]) > LONGEST_RUN:
                each["time"] -= 3600 * fault.size
    return found


LONGEST_RUN = 3600.0
SLACK = 0.05
"""Seconds by which two readings of the clock may be apart."""


def _may_be(incident: Mapping[str, Any], fault: Fault, named: set[int]) -> bool:
    """Return whether an incident that fits a fault may be about it: it names its rank, or none."""
    if fault.kind == "full_disk":  # which all ranks write to
        return True
    if fault.kind == "bad_sample":  # whichever rank it was dealt to
        samples = incident["details"]["samples"]
        return not samples or int(fault.size) in samples
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


def _usual_step(incident: Mapping[str, Any]) -> float | None:
    silent = incident["details"].get("silent") or [{}]
    return silent[0].get("step_usual")


def _apart(loss: float, other: float) -> float:
    """Return the relative difference of two losses; infinite where one is missing or not finite."""
    if not (math.isfinite(loss) and math.isfinite(other)):
        return math.inf
    return abs(loss - other) / abs(other)
