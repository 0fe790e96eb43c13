"""Simulate a pipeline schedule: torch's order of actions, and the time of each. Starts no process."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.pipelining.schedules import get_schedule_class

from ..parallel.config import ParallelConfig
from ..parallel.pipeline.stages import schedule_of, stage_count, stage_ranks

FORWARD, BACKWARD, INPUT, WEIGHT = "F", "B", "I", "W"


@dataclass(frozen=True)
class Action:
    """A micro-batch in a stage. kind: F forward, B whole backward, I backward to the input, W backward to the weights."""

    stage: int
    kind: str
    micro: int


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


@dataclass(frozen=True)
class Span:
    """The time of an action, from `start` to `end`."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """The timeline of a pipeline. spans[r]: the actions of pipeline rank r in order, with their times."""

    spans: list[list[Span]]

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

    def peak(self, rank: int, size: Callable[[int], float]) -> float:
        """Return a rank's peak size of live activations: one of stage s has `size(s)`, and lives from F to B or W."""
        most = now = 0.0
        for span in self.spans[rank]:
            action = span.action
            if action.kind == FORWARD:
                now += size(action.stage)
                most = max(most, now)
            elif action.kind in (BACKWARD, WEIGHT):
                now -= size(action.stage)
        return most


def torch_order(parallel: ParallelConfig, micro_batches: int) -> list[list[Action]]:
    """List each rank's actions in the order in which torch's schedule class of `parallel.schedule` runs them.

    Raises ValueError, in torch's words, for a number of micro-batches that the schedule can't run.
    """
    chosen, count, ranks = schedule_of(parallel), stage_count(parallel), stage_ranks(parallel)
    make = cast(Callable[..., Any], get_schedule_class(chosen.torch_name))

    def stand_in(stage: int) -> Any:
        """Return an object with the attributes of a PipelineStage from which torch computes the order."""
        return SimpleNamespace(
            stage_index=stage,
            num_stages=count,
            group_size=parallel.pp,
            group_rank=0,
            submod=nn.Identity(),
            has_backward=False,
            stage_index_to_group_rank=dict(enumerate(ranks)),
        )

    mine = [stand_in(stage) for stage, rank in enumerate(ranks) if rank == 0]
    single = chosen.stages_per_rank == 1 and chosen.fixed
    schedule = make(mine[0] if single else mine, micro_batches, loss_fn=torch.sub)
    if single:
        # The `pipeline_order` of these two schedules is not the order that they run: in it 1F1B's last rank begins with
        # micro-batch 1.
        ahead = [micro_batches if parallel.schedule == "gpipe" else parallel.pp - rank for rank in range(parallel.pp)]
        return [_one_stage(rank, micro_batches, ahead[rank]) for rank in range(parallel.pp)]
    order = cast(Mapping[int, Sequence[Any]], schedule.pipeline_order)
    return [[action for step in order[rank] for action in _flat(step)] for rank in range(parallel.pp)]


def _one_stage(stage: int, micro_batches: int, ahead: int) -> list[Action]:
    """List a rank's actions: `ahead` forward passes, then a backward and a forward pass in turn (1F1B)."""
    forward = [Action(stage, FORWARD, micro) for micro in range(micro_batches)]
    backward = [Action(stage, BACKWARD, micro) for micro in range(micro_batches)]
    actions = forward[:ahead]
    for micro, action in enumerate(backward):
        actions += [action, *forward[ahead + micro : ahead + micro + 1]]
    return actions


def _flat(step: Any) -> list[Action]:
    """List the computations of an entry of torch's order: none for a wait, two for an overlapped pair."""
    if step is None:
        return []
    if step.sub_actions:
        return [action for part in step.sub_actions for action in _flat(part)]
    kind = step.computation_type.value
    return [Action(step.stage_index, kind, step.microbatch_index)] if kind in (FORWARD, BACKWARD, INPUT, WEIGHT) else []


def simulate(order: Sequence[Sequence[Action]], costs: Sequence[Costs], hop: float = 0.0) -> Timeline:
    """Run the order with these costs per stage: an action starts when its rank is free and its input has arrived.

    hop: time for a tensor to pass from one rank to another.
    """
    last = len(costs) - 1
    holder = {action.stage: rank for rank, actions in enumerate(order) for action in actions}
    done: dict[tuple[str, int, int], float] = {}
    spans: list[list[Span]] = [[] for _ in order]
    position = Counter[int]()
    clock = [0.0] * len(order)

    def arrival(action: Action) -> float | None:
        """Return when its inputs arrive; None while that is not known."""
        stage, micro = action.stage, action.micro
        if action.kind == FORWARD:
            source = None if stage == 0 else (FORWARD, stage - 1, micro)
        elif action.kind == WEIGHT:
            source = (INPUT, stage, micro)
        else:
            source = (FORWARD, stage, micro) if stage == last else (INPUT, stage + 1, micro)
        if source is None:
            return 0.0
        if source not in done:
            return None
        return done[source] + (hop if holder[source[1]] != holder[stage] else 0.0)

    moved = True
    while moved:
        moved = False
        for rank, actions in enumerate(order):
            while position[rank] < len(actions):
                action = actions[position[rank]]
                ready = arrival(action)
                if ready is None:
                    break
                start = max(clock[rank], ready)
                clock[rank] = start + costs[action.stage].of(action.kind)
                spans[rank].append(Span(action, start, clock[rank]))
                # What a whole backward pass owes to the stage before it is there when it ends.
                kind = INPUT if action.kind == BACKWARD else action.kind
                done[kind, action.stage, action.micro] = clock[rank]
                position[rank] += 1
                moved = True
    assert all(position[rank] == len(actions) for rank, actions in enumerate(order)), "the order waits for itself"
    return Timeline(spans)
