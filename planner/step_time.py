"""Predict the seconds of a step, by named parts. Imports no torch.

step = compute of the busiest pipeline rank (products, attention, pointwise, experts, recomputation, exchanges inside blocks)
     + the pipeline's waiting, from its schedule simulated in seconds
     + what gathering weights and reducing gradients can't hide, and what hidden collectives take from computation
     + copies of weights and gradients in memory, offloading, the update, checkpoints, waiting for the slowest rank
     + what the host needs longer to launch a step than its GPU needs, an update on the host not counted
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ..checkpoint.config import CheckpointConfig
from ..config.precision import PRECISIONS
from ..models.config import DecoderConfig
from ..models.costs import block_bytes
from ..optim.optimizers.config import OptimConfig
from ..optim.optimizers.matrix_config import MatrixOptimConfig
from ..parallel.config import ParallelConfig
from ..parallel.layout import Layout, uses_fsdp
from ..parallel.pipeline.stages import StagePlan
from .block_time import BlockTime, BlockWork, Parts, block_time, host_seconds, scaled, summed
from .cluster import ClusterConfig
from .cost import LayoutCost, RankCost
from .engines import engine_moved
from .hybrid import DealtStep
from .kernel_time import Kernels
from .matrix_time import MatrixWork, matrix_parts
from .memory import Job
from .network import gradient_levels, group_of, level_groups, matrix_levels
from .offload import OffloadAccount
from .orders import pipeline_order, repeated
from .parameters import Inventory
from .software import COMPILED, EAGER, Software
from .timeline import Costs, simulate

STEP = 2e-3
"""Seconds of a step besides its kernels: numbers read, hooks, the beginning of the next."""
HOST_WAIT = "waiting for the host"
"""Part of a step in which the GPU waits for the host to launch its passes."""
HOST_UPDATE = 80e9
"""Bytes per second that an update in host memory reads and writes: half a nanosecond for an element of AdamW, of 40 bytes."""
ROUNDS = 4
"""Rounds of `pp` micro-batches that are simulated; more of them only repeat the middle."""


Matrices = Callable[[frozenset[int], int], MatrixWork]
"""(layers, ranks of a stage) → the matrices of these layers."""


def matrices_of(optim: OptimConfig, model: Inventory) -> Matrices | None:
    """Return what a step's whole matrices are counted by; None for an optimizer that has none."""
    if not isinstance(optim, MatrixOptimConfig):
        return None
    return lambda layers, ranks: MatrixWork.of(optim, model, layers, ranks)


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step by part. beside: seconds of communication that computation hides, and that are no part of the step."""

    parts: Parts
    beside: Parts

    @property
    def seconds(self) -> float:
        """Seconds of the step."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Step:
    """Inputs of the prediction of a step's time.

    away      what a rank offloads
    length    mean positions of a document; None: documents are not told apart
    matrices  (layers of a rank) → the whole matrices that its optimizer computes; None: it updates element by element
    saving    how checkpoints are saved; None: not at all
    dealt     how hybrid data parallelism deals documents of known lengths; None: it does not, or they are not known
    islands   of the run (`optim.local`): the step is one's, whose layout this is, and all take theirs at the same time
    """

    model: DecoderConfig
    parallel: ParallelConfig
    layout: Layout
    job: Job
    cost: LayoutCost
    away: OffloadAccount
    cluster: ClusterConfig
    length: float | None = None
    software: Software | None = None
    matrices: Matrices | None = None
    saving: CheckpointConfig | None = None
    dealt: DealtStep | None = None
    islands: int = 1

    @property
    def gpus(self) -> int:
        """GPUs of the whole run, of all islands."""
        return self.islands * self.layout.world_size

    @property
    def traits(self) -> Software:
        """Traits of the software: this program's, where no other was named."""
        return self.software or (COMPILED if self.job.compiled else EAGER)


def step_time(step: Step, *, simulated: bool = True) -> StepTime:
    """Predict a step. simulated: whether to count what a pipeline waits; without, the result is a bound from below."""
    kernels = Kernels(step.cluster, step.job.precision)
    stages = _stage_times(step, kernels)
    compute, forward, backward = _compute(step, stages, simulated)
    rank = max(step.cost.ranks, key=lambda each: each.elements)
    outside, beside = _outside(step, kernels, rank, forward, backward)
    parts = summed(compute, outside)
    parts[HOST_WAIT] = max(0.0, _host_time(step) - sum(parts.values()))
    parts = summed(parts, _after_passes(step, rank))
    nodes = -(-step.layout.world_size // step.cluster.gpus_per_node)
    if nodes > 1:
        parts["slowest rank"] = sum(parts.values()) * step.cluster.rates.jitter * math.log2(nodes)
    parts["checkpoints"] = _waiting_for_checkpoints(step, rank, sum(parts.values()) - parts["update"])
    return StepTime({name: seconds for name, seconds in parts.items() if seconds > 0}, beside)


def _host_time(step: Step) -> float:
    """Predict in what time the busiest rank's host launches a step. It runs ahead of the GPU from the first block on."""
    rates, policies = step.cluster.rates, step.job.policies
    blocks = step.model.blocks()
    ranks = (
        sum(host_seconds(blocks[layer], policies[layer], step.traits, rates) for layers in rank.layers for layer in layers)
        for rank in step.cost.ranks
    )
    return max(ranks) * step.job.micro_batches


def _stage_times(step: Step, kernels: Kernels) -> list[BlockTime]:
    """Predict the passes of every stage over one micro-batch."""
    parallel, job = step.parallel, step.job
    length = min(step.length or job.seq_len, job.seq_len)
    work = BlockWork.of(job, parallel, step.layout, step.traits, kernels, length=length, policy="none")
    times: dict[tuple[int, str], BlockTime] = {}
    shapes = step.model.blocks()
    stages: list[BlockTime] = []
    plan = step.cost.plan
    for at, layers in enumerate(plan.layers):
        passes = [ends_time(step.model, parallel.tp, kernels, work.tokens, first=at == 0, last=at == plan.count - 1)]
        for layer in layers:
            block, policy = shapes[layer], job.policies[layer]
            if (id(block), policy) not in times:
                times[id(block), policy] = block_time(block, replace(work, policy=policy), kernels)
            passes.append(times[id(block), policy])
        stages.append(
            BlockTime(
                summed(*(each.forward for each in passes)),
                summed(*(each.to_input for each in passes)),
                summed(*(each.to_weight for each in passes)),
            )
        )
    return stages


def ends_time(model: DecoderConfig, tp: int, kernels: Kernels, tokens: float, *, first: bool, last: bool) -> BlockTime:
    """Predict the passes of the embedding, and of the head with the loss, whose gradient comes with the forward pass."""
    dim, rows = model.dim, model.known_vocabulary / tp
    forward, to_input, to_weight = dict[str, float](), dict[str, float](), dict[str, float]()
    if first:
        forward["embedding"] = kernels.pointwise(2 * dim * tokens * kernels.unit)
        to_weight["embedding"] = kernels.pointwise(6 * dim * tokens * kernels.unit)
    if last:
        head = kernels.product(tokens, rows, dim)
        # Logits are written, read for their softmax, and their gradient is written and read twice.
        forward["head and loss"] = head + kernels.pointwise(5 * kernels.unit * tokens * rows)
        to_input["head and loss"], to_weight["head and loss"] = head, head
    return BlockTime(forward, to_input, to_weight)


def _compute(step: Step, stages: Sequence[BlockTime], simulated: bool) -> tuple[dict[str, float], float, float]:
    """Predict the compute of the busiest rank in a step, with its waiting, and the passes beside which collectives may hide.

    Returns parts, and seconds of a micro-batch's forward and backward pass on that rank.
    """
    plan, many = step.cost.plan, step.job.micro_batches
    ranks = [[stages[stage] for stage in plan.held_by(rank)] for rank in range(step.parallel.pp)]
    work = [summed(*(parts for each in held for parts in (each.forward, each.to_input, each.to_weight))) for held in ranks]
    busiest = max(range(len(ranks)), key=lambda rank: sum(work[rank].values()))
    forward = sum(sum(each.forward.values()) for each in ranks[busiest])
    backward = sum(work[busiest].values()) - forward
    parts = scaled(work[busiest], many)
    if plan.count > 1 and simulated:
        parts["pipeline bubble"] = _pipeline_seconds(step, stages, plan) - sum(parts.values())
    if step.dealt is not None:
        parts = scaled(parts, step.dealt.filled)
        parts["waiting for documents"] = sum(parts.values()) * step.dealt.waiting / (1 - step.dealt.waiting)
    return parts, forward, backward


def _pipeline_seconds(step: Step, stages: Sequence[BlockTime], plan: StagePlan) -> float:
    """Simulate the schedule in seconds; long ones are continued from their middle."""
    parallel, many = step.parallel, step.job.micro_batches
    costs = [Costs(*(sum(parts.values()) for parts in (each.forward, each.to_input, each.to_weight))) for each in stages]
    tokens = step.job.tokens / parallel.cp
    cut = parallel.tp if parallel.sequence_parallel else 1
    link = group_of(step.cluster, step.layout, "pp")
    hop = link.send(tokens * step.model.dim * PRECISIONS[step.job.precision].bytes / cut)

    def seconds(count: int) -> float:
        return simulate(pipeline_order(parallel, count), costs, hop).length

    short, shorter = (repeated(parallel, many, least) for least in (ROUNDS, ROUNDS - 1))
    end = seconds(short)
    return end if short == many else end + (end - seconds(shorter)) / (short - shorter) * (many - short)


def _outside(
    step: Step, kernels: Kernels, rank: RankCost, forward: float, backward: float
) -> tuple[dict[str, float], dict[str, float]]:
    """Predict what a step takes outside of blocks while its host launches, and the communication that is hidden.

    forward, backward: seconds of a micro-batch's passes
    """
    job, away, cluster = step.job, step.away, step.cluster
    traffic = engine_moved(step.parallel)(rank, step.parallel, step.layout, job)
    # Before all levels but the last, rows are sorted by who gets them.
    sorted_bytes = sum(2 * level.width * level.elements for level in _levels(step, rank)[:-1])
    parts = {"copies of weights and gradients": kernels.pointwise(traffic.within + sorted_bytes)}
    if step.parallel.engine == "deepspeed":
        exposed, beside = _deepspeed_exchanges(step, traffic.between, forward, backward)
    else:
        exposed, beside = _exchanges(step, rank, forward, backward)
    parts |= exposed
    host = away.to_host + away.from_host
    if "offload" in job.policies:  # there and back, in order with the computation
        shapes = [step.model.block(layer) for layers in rank.layers for layer in layers]
        host += 2 * job.micro_batches * sum(block_bytes(each, job.forward_pass(step.parallel), "none") for each in shapes)
    parts["host transfers"] = host / (cluster.host_link * 1e9)
    elementwise = 1.0
    if step.matrices is not None and step.parallel.offload == "none":
        layout, layers = step.layout, frozenset(layer for held in rank.layers for layer in held)
        work = step.matrices(layers, layout.stage_ranks)
        masters = Kernels(cluster, "fp64" if PRECISIONS[job.precision].accum_bytes == 8 else "fp32")
        levels = level_groups(cluster, matrix_levels(step.parallel, layout, cluster.gpus_per_node), 1, layout.world_size)
        held = _matrix_elements(work, rank, layout)
        parts |= matrix_parts(work, masters, levels, job.precision, held)
        elementwise = max(0.0, 1 - held / max(1, rank.elements))
    parts["update"] = kernels.pointwise(traffic.update * elementwise) if step.parallel.offload == "none" else 0.0
    return parts, beside


def _after_passes(step: Step, rank: RankCost) -> dict[str, float]:
    """Predict what begins when the host has launched the passes and their GPU has ended: its own update, the disk, and STEP."""
    away, cluster = step.away, step.cluster
    local = min(step.gpus, cluster.gpus_per_node)
    parts = {"disk": (away.disk_read + away.disk_written) * local / (cluster.disk * 1e9), "update": STEP}
    if step.parallel.offload != "none":
        parts["update"] += engine_moved(step.parallel)(rank, step.parallel, step.layout, step.job).update / HOST_UPDATE
    return parts


def _matrix_elements(work: MatrixWork, rank: RankCost, layout: Layout) -> float:
    """Return the elements of matrices whose weights and state lie on a rank: under ZeRO-0 each data rank has all of them."""
    dealt = rank.experts * layout.expert_weights * layout.ep
    return min(rank.elements, (work.elements - dealt) / layout.tp / layout.weight_ranks + rank.experts)


def _waiting_for_checkpoints(step: Step, rank: RankCost, passes: float) -> float:
    """Predict what saving makes training wait, as a part of every step.

    passes: seconds of a step before its update, in which a snapshot is copied; the update waits for the rest. Waiting for the
    disk, too, is asked for by mode sync, and by snapshots that are put together there.
    """
    saving, layout, cluster = step.saving, step.layout, step.cluster
    if saving is None or not saving.every:
        return 0.0
    precision = PRECISIONS[step.job.precision]
    unit = precision.bytes if step.job.masters == "bf16_stochastic" else precision.accum_bytes
    kept = rank.elements * unit + (rank.optimizer or 0)
    size = kept * layout.weight_ranks / layout.gradient_ranks  # of copies each saves a part
    copied = size / (cluster.host_link * 1e9)
    written = size * min(step.gpus, cluster.gpus_per_node) / (cluster.disk * 1e9)
    if saving.mode == "sync":
        return (copied + written) / saving.every
    seconds = written if saving.snapshot_folder is not None else copied
    return max(0.0, seconds - passes) / saving.every


def _exchanges(step: Step, rank: RankCost, forward: float, backward: float) -> tuple[dict[str, float], dict[str, float]]:
    """Predict the torch engine's gathering of weights and reducing of gradients, each with the pass that may hide it.

    Whole weights are gathered and reduced once a step. FSDP2 gathers for every pass under ZeRO-3, once a step otherwise, and
    reduces every micro-batch under ZeRO-2 and 3; through a pipeline both once.
    """
    parallel, layout, job = step.parallel, step.layout, step.job
    if layout.gradient_ranks == 1:
        return {}, {}
    unit, exact, many = PRECISIONS[job.precision].bytes, PRECISIONS[job.precision].accum_bytes, job.micro_batches
    whole, blocks = rank.whole(layout), sum(map(len, rank.layers)) + 1
    shards, copies = group_of(step.cluster, layout, "shard", "cp"), group_of(step.cluster, layout, "replicate")
    every = uses_fsdp(parallel, layout) and parallel.pp == 1
    exchange = _Hiding(step.cluster, step.traits.overlaps)
    if layout.zero == 0:
        reduced = copies if layout.cp == 1 else group_of(step.cluster, layout, "replicate", "shard", "cp")
        sent = _grad(unit, exact, many) * whole
        exchange.add("gradient reduction", reduced.all_reduce(sent, blocks), 2 * sent, backward, blocks)
    elif not every:
        sent = _grad(unit, exact, many) * whole
        late = parallel.pp > 1 or step.traits.reduces_late
        seconds = shards.gather(sent, blocks)
        if levels := _levels(step, rank):
            groups = level_groups(step.cluster, [level.size for level in levels], layout.tp, layout.world_size)
            sizes = [level.width * level.elements for level in levels]
            seconds = sum(each.exchange(size, blocks) for each, size in zip(groups, sizes, strict=True))
            sent = sum(sizes)
        exchange.add("gradient reduction", seconds, sent, 0.0 if late else backward, blocks)
        exchange.add("weight gathering", shards.gather(unit * whole, blocks), unit * whole, forward, blocks)
    else:
        times = 2 * many if layout.zero == 3 else 1
        reductions = many if layout.zero >= 2 else 1
        # Copy engines exchange gradients as they are computed; NCCL sums them in fp32.
        narrow = parallel.copy_engines and shards.bandwidth == shards.local
        gathered, sent = unit * whole, (unit if narrow else exact) * whole
        exchange.add("weight gathering", shards.gather(gathered, blocks), gathered, forward, blocks, max(1, times // 2))
        # A backward pass hides its gathering and its reduction.
        again = gathered if layout.zero == 3 else 0
        seconds = shards.gather(again + sent, 2 * blocks if again else blocks)
        exchange.add("gradient reduction", seconds, again + sent, backward, blocks, reductions)
    if layout.replicate > 1 and layout.zero:
        own = exact * rank.elements
        window = 0.0 if parallel.pp > 1 else backward
        exchange.add("gradient reduction", copies.all_reduce(own, blocks), 2 * own, window, blocks)
    return exchange.parts, exchange.beside


@dataclass(frozen=True)
class _Level:
    """A level of the gradient exchange.

    size      ranks that exchange
    elements  that each of them has, of `width` bytes
    """

    size: int
    elements: float
    width: int


def _levels(step: Step, rank: RankCost) -> list[_Level]:
    """Return the levels in which ranks exchange gradients; none where they don't, but reduce-scatter or all-reduce them."""
    parallel, layout, precision = step.parallel, step.layout, PRECISIONS[step.job.precision]
    if not (parallel.exchanges_rows and step.traits.sums_received_rows):
        return []
    width, elements = _grad(precision.bytes, precision.accum_bytes, step.job.micro_batches), rank.whole(layout)
    found: list[_Level] = []
    for size in gradient_levels(parallel, layout, step.cluster.gpus_per_node):
        found.append(_Level(size, elements, width))
        # What goes on is a sum, as wide as the masters.
        width, elements = precision.accum_bytes, elements / size
    return found


def _deepspeed_exchanges(
    step: Step, between: float, forward: float, backward: float
) -> tuple[dict[str, float], dict[str, float]]:
    """Predict DeepSpeed's exchanges of `between` bytes sent in a step: beside passes under ZeRO-3, at the end of the others."""
    layout, many = step.layout, step.job.micro_batches
    if layout.world_size == 1:
        return {}, {}
    ranks = group_of(step.cluster, layout, "replicate", "shard")
    blocks = step.model.layers + 1
    exchange = _Hiding(step.cluster, step.traits.overlaps)
    times = many if layout.zero >= 2 else 1
    seconds = between / times / ranks.bandwidth + 3 * blocks * ranks.latency
    window = (forward + backward) / 2 if layout.zero == 3 else 0.0
    exchange.add("gradient reduction", seconds, between / times, window, blocks, times)
    return exchange.parts, exchange.beside


def _grad(unit: int, exact: int, many: int) -> int:
    """Return the bytes in which an element of a gradient travels: added up, it is as wide as the masters."""
    return unit if many == 1 else exact


class _Hiding:
    """Adds up communication beside computation: what sticks out, what it takes from computation, and what is hidden."""

    def __init__(self, cluster: ClusterConfig, overlaps: float) -> None:
        self._rates, self._local, self._overlaps = cluster.rates, cluster.link * 1e9 * cluster.rates.link, overlaps
        self.parts: dict[str, float] = {}
        self.beside: dict[str, float] = {}

    def add(self, name: str, seconds: float, size: float, window: float, groups: int, times: int = 1) -> None:
        """Add communication of `size` bytes in so many groups, `times` a step, each time beside `window` seconds.

        The first group's has nothing to hide behind.
        """
        if not seconds:
            return
        hidden = min(seconds * (1 - 1 / groups), window * self._overlaps)
        self.parts[name] = self.parts.get(name, 0.0) + times * (seconds - hidden)
        if hidden:
            felt = hidden / seconds * size / self._local * self._rates.contention
            self.parts["contention"] = self.parts.get("contention", 0.0) + times * felt
            self.beside[name] = self.beside.get(name, 0.0) + times * hidden
