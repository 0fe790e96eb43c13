"""Estimate a step's seconds, to rank the settings that `meshloom tune` tries. Only the order of the estimates counts.

    seconds = FLOPs / rate  +  a little per block and micro-batch  +  bytes within the GPU / its bandwidth
              +  bytes between GPUs / theirs  +  bytes to and from the host / theirs
              +  bytes of the update / the bandwidth of what holds the state  +  bytes to and from the disk / its bandwidth

Nothing is taken to overlap: on two GPUs what travels beside the computation slows that down by about as much as it would
take alone. What all settings of one layout share (the exchanges of tensor and context parallelism, of a pipeline's stages) is
left out. The constants are an H200's; on another GPU the order is mostly the same, since its figures are in like proportion.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..config.precision import PRECISIONS
from ..models.costs import block_bytes
from ..models.protocol import Model, decoder_shape
from ..parallel.config import ParallelConfig
from ..parallel.layout import Layout, uses_fsdp
from .cost import LayoutCost, RankCost
from .memory import Job
from .offload import OffloadAccount

RATE = {"bf16": 595e12, "fp32": 50e12, "fp64": 50e12}
"""FLOP/s of a whole step's kernels, with attention counted by its causal half, as the planner does. bf16: Llama 1B, 4 × 8,192
tokens on one H200 at 62,500 tokens/s, less the terms below. fp32 and fp64: three quarters of the data sheet's 67e12."""

BLOCK = 1e-3
"""Seconds of a block's two passes over a micro-batch besides its tokens' share: launches, kernels' ends, smaller products.
Llama 1B (16 blocks) on one H200: a step of one micro-batch of 4 takes 549 ms, of 4 micro-batches of 1 609 ms, of which 14 are
adding up. A third is the forward pass's, and comes again where anything is computed again."""

MEMORY = 4.3e12
"""Bytes per second that pointwise kernels read and write (H200)."""

LINK = 450e9
"""Bytes per second and direction between GPUs of a node (NVLink 4). Llama 1B on two H200, 4 × 8,192 tokens each: ZeRO-1
60,000 tokens/s a GPU, ZeRO-3 58,450, which are 14 ms a step."""

NODE_LINK = 50e9
"""Bytes per second and direction of a GPU's share of the network between nodes (400 Gb/s; not measured). They hide behind
computation as long as that lasts."""

HOST = 27e9
"""Bytes per second between a GPU and locked host memory (H200's host: 18 GB of a snapshot in 0.67 s)."""

HOST_UPDATE = 60e9
"""Bytes per second that a process's update reads and writes in host memory: 0.3 B parameters under DeepSpeed ZeRO-3, offloaded
to the host of an H200 (16 cores), take 518 ms a step and 140 without; 180 of the difference are the bus."""

DISK = 2e9
"""Bytes per second read and written of a local disk, by all processes of a node: the same model on that machine's disk takes
4.9 s a step, with 9.6 GB to and fro. A good NVMe disk does more; what is on it waits for it all the same."""

UPDATE = 30
"""Bytes per parameter that AdamW in one pass moves: weight and two moments read and written in fp32, the gradient read for its
norm and for the update, the computation's copy written."""


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


def step_seconds(
    model: Model,
    parallel: ParallelConfig,
    layout: Layout,
    job: Job,
    cost: LayoutCost,
    away: OffloadAccount,
    moved: Moved,
    nodes: int = 1,
) -> float:
    """Estimate the seconds of one step, for comparison with other settings of the same model, batch and layout axes.

    cost, away, moved: as `layout_cost`, `engine_cost` and `engine_moved` give them.
    """
    waiting = cost.timeline.bubble if cost.timeline is not None else 0.0
    work = sum(rank.flops for rank in cost.ranks) / len(cost.ranks)
    busiest = max(cost.ranks, key=lambda rank: sum(map(len, rank.layers)))
    blocks = sum(map(len, busiest.layers))
    again = sum(job.policies[layer] in ("selective", "full") for layers in busiest.layers for layer in layers)
    passes = work / RATE[job.precision] + job.micro_batches * (blocks + again / 3) * BLOCK
    traffic = moved(busiest, parallel, layout, job)
    host = away.to_host + away.from_host
    if "offload" in job.policies:  # there and back, in order with the computation
        shapes = [decoder_shape(model).block(layer) for layers in busiest.layers for layer in layers]
        host += 2 * job.micro_batches * sum(block_bytes(block, job.forward_pass(parallel), "none") for block in shapes)
    update = traffic.update / (MEMORY if parallel.offload == "none" else HOST_UPDATE)
    disk = (away.disk_read + away.disk_written) * layout.world_size / nodes / DISK
    seconds = passes / (1 - waiting) + traffic.within / MEMORY + traffic.between / LINK + host / HOST + update + disk
    return seconds if nodes == 1 else max(seconds, traffic.between / NODE_LINK)


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
    own, whole = rank.elements, rank.elements * ways
    away, copied = (ways - 1) / ways, 2 * (copies - 1) / copies
    adding = (unit + 2 * exact) * whole
    update = UPDATE * own
    if not uses_fsdp(parallel, layout):
        gradient = unit if many == 1 else exact
        within = many * adding if many > 1 else 0
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
