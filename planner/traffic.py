"""Count the bytes that a step of the torch engine moves for weights, gradients and the update. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..config.precision import PRECISIONS
from ..parallel.config import ParallelConfig
from ..parallel.layout import Layout, uses_fsdp
from .cost import RankCost
from .memory import Job

UPDATE = 30
"""Bytes per parameter that AdamW in one pass moves: weight and two moments read and written in fp32, the gradient read for its
norm and for the update, the computation's copy written."""
ROUNDING = {"full": 0, "bf16_kahan": -2, "bf16_stochastic": -6}
"""More bytes per parameter, by `trainer.masters`: the update reads and writes bf16 numbers in the place of masters, and no copy
(`kernels/triton_adamw.py`). Of other optimizers masters are made and rounded in passes of their own, which are not counted: 12
bytes for bf16_stochastic and 24 for bf16_kahan."""


@dataclass(frozen=True)
class Traffic:
    """Bytes that a rank moves in a step.

    within   weights and gradients, read and written within its GPU
    between  weights and gradients, sent to other ranks
    update   of the optimizer's update, wherever its state lies
    """

    within: float
    between: float
    update: float


Moved = Callable[[RankCost, ParallelConfig, Layout, Job], Traffic]


def torch_moved(rank: RankCost, parallel: ParallelConfig, layout: Layout, job: Job) -> Traffic:
    """Count the bytes that the torch engine moves.

    For M micro-batches, over w ranks that share the weights' state and c that hold copies of it:

    whole weights   gradients are read and sent once, in the computation's dtype where M is 1 and the masters' where they
                    are added up; weights are gathered once, in place
    FSDP2           shards are cast, gathered into one buffer and copied out of it; gradients are widened as they are copied
                    in. ZeRO-2 does the first once and the second M times, ZeRO-3 2 M and M times, a pipeline once each
    """
    unit, exact = PRECISIONS[job.precision].bytes, PRECISIONS[job.precision].accum_bytes
    ways, ranks = layout.weight_ranks, layout.gradient_ranks
    copies = ranks // ways
    many = job.micro_batches
    own, whole = rank.elements, rank.whole(layout)
    away, copied = (ways - 1) / ways, 2 * (copies - 1) / copies
    adding = (unit + 2 * exact) * whole
    update = UPDATE * own
    if not uses_fsdp(parallel, layout):
        gradient = unit if many == 1 else exact
        update += ROUNDING[job.masters] * own
        within = many * adding if many > 1 else 0.0
        if ranks > 1:
            within += 3 * gradient * whole + exact * own
        return Traffic(within, (unit + gradient) * whole * away + exact * own * copied, update)
    once = parallel.pp > 1
    gathers = 1 if once or layout.zero < 3 else 2 * many
    reductions = 1 if once or layout.zero < 2 else many
    within = gathers * ((exact + unit) * own + 2 * unit * whole) + reductions * ((unit + exact) * whole + exact * own)
    within += many * adding if once else 3 * exact * (reductions - 1) * own
    between = (gathers * unit + reductions * exact) * whole * away + exact * own * copied
    return Traffic(within, between, update)
