"""The order in which torch's own schedule classes run a pipeline's actions: the oracle of `planner/orders.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.pipelining.schedules import get_schedule_class

from meshloom.parallel.config import ParallelConfig
from meshloom.parallel.pipeline.stages import schedule_of, stage_count, stage_ranks
from meshloom.planner.orders import BACKWARD, FORWARD, INPUT, WEIGHT, Action


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
        return [one_stage(rank, micro_batches, ahead[rank]) for rank in range(parallel.pp)]
    order = cast(Mapping[int, Sequence[Any]], schedule.pipeline_order)
    return [[action for step in order[rank] for action in _flat(step)] for rank in range(parallel.pp)]


def one_stage(stage: int, micro_batches: int, ahead: int) -> list[Action]:
    """List a rank's actions: `ahead` forward passes, then a backward and a forward pass in turn (1F1B)."""
    forward = [Action(stage, FORWARD, micro) for micro in range(micro_batches)]
    actions = forward[:ahead]
    for micro in range(micro_batches):
        actions += [Action(stage, BACKWARD, micro), *forward[ahead + micro : ahead + micro + 1]]
    return actions


def _flat(step: Any) -> list[Action]:
    """List the computations of an entry of torch's order: none for a wait, two for an overlapped pair."""
    if step is None:
        return []
    if step.sub_actions:
        return [action for part in step.sub_actions for action in _flat(part)]
    kind = step.computation_type.value
    return [Action(step.stage_index, kind, step.microbatch_index)] if kind in (FORWARD, BACKWARD, INPUT, WEIGHT) else []
