"""Count the bytes that a step of the torch engine moves for weights, gradients and the update. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..config.precision import PRECISIONS
from ..parallel.config import ParallelConfig
from ..parallel.layout import Layout, uses_fsdp
from .cost import RankCost
from .memory import Job


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
                    are added up; weights are gathered once, in place; masters that exist only in an update are made of them
                    and rounded
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
    update = _update_traffic(rank, parallel, layout, job) * own
    if not uses_fsdp(parallel, layout):
        gradient = unit if many == 1 else exact
        within = many * adding if many > 1 else 0.0
        within += _making_traffic(rank, job) * own
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


def _update_traffic(rank: RankCost, parallel: ParallelConfig, layout: Layout, job: Job) -> float:
    """Count the bytes that an update moves for an element, with the gradient's norm and scale, and the computation's copy.

    A kernel of ours reads gradient, state and weight and writes state, weight and copy (`kernels/triton_adamw.py`,
    `triton_eight_bit.py`); the norm reads the gradient before. In the place of weight and copy it may read and write what is
    kept of bf16 weights. Without such a kernel each is a pass of its own: of a gradient that is widened and scaled, of the
    optimizer's operations, of the copy.
    """
    unit, exact, needs = PRECISIONS[job.precision].bytes, PRECISIONS[job.precision].accum_bytes, rank.needs
    whole = not uses_fsdp(parallel, layout)
    narrow = whole and job.narrow_gradients(layout.gradient_ranks)
    copies = whole and unit < exact and job.masters == "full"
    if needs.fused and exact == 4 and parallel.offload == "none":
        weight = 2 * exact + (unit if copies else 0)
        if needs.rounded and job.masters != "full":
            weight = 2 * unit * (2 if job.masters == "bf16_kahan" else 1)
        return 2 * (unit if narrow else exact) + 2 * needs.moments + weight
    gradient = 3 * exact + (unit + exact if narrow else 0)
    return gradient + needs.passes * exact + (unit + exact if copies else 0)


def _making_traffic(rank: RankCost, job: Job) -> int:
    """Count the bytes that masters move for an element which are made for an update, and rounded after it."""
    made = 0 if rank.needs.rounded else PRECISIONS[job.precision].bytes + PRECISIONS[job.precision].accum_bytes
    return {"full": 0, "bf16_stochastic": 2, "bf16_kahan": 4}[job.masters] * made
