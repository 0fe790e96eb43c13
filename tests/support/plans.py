"""Plans of runs, from the command line's words."""

from __future__ import annotations

from meshloom.launch.planning import Plan, make_plan
from meshloom.planner.cluster import load_cluster
from meshloom.planner.step_time import Step, step_time

LLAMA = ["recipe=llama_1b", "batch.samples=8"]


SMALL = ["recipe=llama_1b", "model.layers=2"]


def tokens_per_second(*words: str) -> float:
    """Predicted, of one GPU."""
    plan = make_plan(["recipe=llama_1b", *words])
    return plan.samples * plan.job.seq_len / seconds(plan) / plan.layout.world_size


def seconds(plan: Plan) -> float:
    """Predicted, of a step on H200."""
    cluster = load_cluster([f"cluster=h200x{max(8, plan.layout.world_size)}"])
    return step_time(Step(plan.model.shape, plan.parallel, plan.layout, plan.job, plan.cost, plan.away, cluster)).seconds
