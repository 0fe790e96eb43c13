"""Simulate a pipeline schedule: the time of each action, for any order and costs. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .orders import BACKWARD, FORWARD, INPUT, WEIGHT, Action


@dataclass(frozen=True)
class Costs:
    """Time of each kind of action of one stage, in any unit. B takes I and W together."""

    forward: float
    to_input: float
    to_weight: float

    def of(self, kind: str) -> float:
        """Return the time of an action of this kind."""
        parts = {FORWARD: self.forward, INPUT: self.to_input, WEIGHT: self.to_weight}
        return parts[kind] if kind in parts else self.to_input + self.to_weight


class ActionTime(NamedTuple):
    """The time of an action, from `start` to `end`."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """The timeline of a pipeline. spans[r]: the actions of pipeline rank r in order, with their times."""

    spans: list[list[ActionTime]]

    @property
    def length(self) -> float:
        """The time at which the last rank ends."""
        return max(span.end for row in self.spans for span in row)

    @property
    def busy(self) -> float:
        """The sum of the times of all ranks' actions."""
        return sum(span.end - span.start for row in self.spans for span in row)

    @property
    def bubble(self) -> float:
        """The bubble: the share of the ranks' time spent waiting; (p − 1) / (v·m + p − 1) for 1F1B."""
        return 1 - self.busy / (self.length * len(self.spans))


def peak(actions: Iterable[Action], size: Callable[[int], float]) -> float:
    """Return a rank's peak size of live activations: one of stage s has `size(s)`, and lives from F to B or W."""
    most = now = 0.0
    for action in actions:
        if action.kind == FORWARD:
            now += size(action.stage)
            most = max(most, now)
        elif action.kind in (BACKWARD, WEIGHT):
            now -= size(action.stage)
    return most


def simulate(order: Sequence[Sequence[Action]], costs: Sequence[Costs], hop: float = 0.0) -> Timeline:
    """Run the order with these costs per stage: an action starts when its rank is free and its input has arrived.

    hop: time for a tensor to pass from one rank to another.
    """
    last = len(costs) - 1
    waits: dict[tuple[str, int, int], int] = {}  # what is not there yet → the rank that waits for it
    holder = {action.stage: rank for rank, actions in enumerate(order) for action in actions}
    delay = [hop if stage and holder[stage] != holder[stage - 1] else 0.0 for stage in range(len(costs))]
    durations = [{kind: each.of(kind) for kind in (FORWARD, BACKWARD, INPUT, WEIGHT)} for each in costs]
    done: dict[tuple[str, int, int], float] = {}
    spans: list[list[ActionTime]] = [[] for _ in order]
    clock = [0.0] * len(order)
    ready = list(range(len(order)))
    while ready:
        rank = ready.pop()
        actions, mine, now = order[rank], spans[rank], clock[rank]
        for action in actions[len(mine) :]:
            stage, kind, micro = action.stage, action.kind, action.micro
            arrival = 0.0
            if kind == FORWARD:
                source = (FORWARD, stage - 1, micro) if stage else None
                late = delay[stage]
            elif kind == WEIGHT:
                source, late = (INPUT, stage, micro), 0.0
            elif stage == last:
                source, late = (FORWARD, stage, micro), 0.0
            else:
                source, late = (INPUT, stage + 1, micro), delay[stage + 1]
            if source is not None:
                if source not in done:
                    waits.setdefault(source, rank)
                    break
                arrival = done[source] + late
            start = max(now, arrival)
            now = start + durations[stage][kind]
            mine.append(ActionTime(action, start, now))
            # What a whole backward pass owes to the stage before it is there when it ends.
            made = (INPUT if kind == BACKWARD else kind, stage, micro)
            done[made] = now
            if made in waits:
                ready.append(waits.pop(made))
        clock[rank] = now
    assert all(len(mine) == len(actions) for mine, actions in zip(spans, order, strict=True)), "the order waits for itself"
    return Timeline(spans)
