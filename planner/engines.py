"""Choose the account of costs that belongs to a run's engine."""

from __future__ import annotations

from ..parallel.config import ParallelConfig
from ..parallel.layout import Layout
from .cost import RankCost
from .deepspeed_memory import deepspeed_cost
from .deepspeed_traffic import deepspeed_moved
from .memory import Cutter, Job
from .offload import OffloadAccount, torch_offload_cost
from .parameters import Inventory
from .traffic import Moved, torch_moved


def engine_cost(
    rank: RankCost, model: Inventory, parallel: ParallelConfig, layout: Layout, job: Job
) -> tuple[RankCost, OffloadAccount]:
    """Adjust a rank's costs to the engine: what its GPU holds, what is offloaded, and what a step moves between them.

    rank: as `cost.layout_cost` gives it for this `parallel`.
    """
    if parallel.engine == "deepspeed":
        return deepspeed_cost(rank, model, parallel, job, layout.world_size)
    if parallel.offload != "none":
        return torch_offload_cost(
            rank, Cutter(layout).cut(model.stage(range(model.shape.layers), first=True, last=True)), layout.zero, job
        )
    return rank, OffloadAccount()


def engine_moved(parallel: ParallelConfig) -> Moved:
    """Choose the function that counts what the engine's step moves, for `step_time.step_time`."""
    return deepspeed_moved if parallel.engine == "deepspeed" else torch_moved
