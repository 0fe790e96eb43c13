"""Plans of runs, from the command line's words."""

from __future__ import annotations

from meshloom.launch.planning import Plan, make_plan
from meshloom.planner.engines import engine_moved
from meshloom.planner.speed import step_seconds

LLAMA = ["recipe=llama_1b", "batch.samples=8"]


SMALL = ["recipe=llama_1b", "model.layers=2"]


def tokens_per_second(*words: str) -> float:
    """Predicted, of one GPU."""
    plan = make_plan(["recipe=llama_1b", *words])
    return plan.samples * plan.job.seq_len / seconds(plan) / plan.layout.world_size


def seconds(plan: Plan) -> float:
    """Predicted, of a step."""
    moved = engine_moved(plan.parallel)
    return step_seconds(plan.model, plan.parallel, plan.layout, plan.job, plan.cost, plan.away, moved)
