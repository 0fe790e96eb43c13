"""Compute what a layout costs each rank, by arithmetic alone: FLOPs, and bytes by what holds them.

Weights, gradients and optimizer state are counted exactly, from the shapes of the parameters and how they are cut.
Activations are estimated from what the operations of a block keep for its backward pass; so are working memory and the
rest of what lives for moments. What CUDA, NCCL and a fragmented allocator take (some GiB) is not counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace

from ..config.precision import PRECISIONS
from ..models.config import DecoderConfig
from ..models.costs import (
    ForwardPass,
    block_bytes,
    embedding_flops,
    flops_per_token,
    head_flops,
    layer_flops,
    loss_bytes,
    recomputed_flops,
)
from ..parallel.config import ParallelConfig
from ..parallel.layout import Layout, uses_fsdp
from ..parallel.pipeline.stages import StagePlan, balanced_stages, cell_stages
from .memory import Cutter, Job, OptimizerBytes, OptimizerNeeds, WeightGroup
from .network import gradient_levels
from .orders import Order, pipeline_order, repeated
from .parameters import CELL, Inventory
from .timeline import Costs, Timeline, peak, simulate

KINDS = ("weights", "gathered", "gradients", "optimizer", "activations", "working", "update")
"""Fields of `RankCost` that tell what fills a GPU. The last ones do not all peak together."""


@dataclass(frozen=True)
class RankCost:
    """One pipeline coordinate's costs: those of its ranks with the largest shards. Bytes, but for the first four and `needs`.

    layers      layers of each of its stages
    elements    parameters that it holds the master of
    experts     of these, those of experts that expert parallelism deals out
    flops       forward and backward, recomputation included, per step
    weights     its shards of the weights, in training precision
    gathered    weights in the precision of the computation, at most at once
    gradients   at most at once
    optimizer   state of the optimizer; None where it can't be known before it runs
    held        gradients that earlier micro-batches have left when a forward pass ends
    activations kept for backward passes, at most at once
    working     what lives for moments: the loss's logits, one block's backward pass, buffers between stages; and `buffers`
    late        of that the part beside all gradients, without the loss, whose memory is free again by then
    update      at most during the optimizer's update, when activations are free: gradients as it reads them, what it holds for
                updates of whole matrices, and masters that exist only then; without `buffers`
    buffers     of copy engines, which are kept: a part of `working` and `late`
    needs       of the optimizer, wherever its state is
    """

    layers: list[range]
    elements: int
    experts: int
    flops: float
    weights: int
    gathered: int
    gradients: int
    held: int
    optimizer: int | None
    activations: int
    working: int
    late: int
    update: int
    buffers: int
    needs: OptimizerNeeds

    def whole(self, layout: Layout) -> int:
        """Return the elements of its weights where they are gathered."""
        return (self.elements - self.experts) * layout.weight_ranks + self.experts * layout.expert_weights

    @property
    def at_peak(self) -> dict[str, int]:
        """Bytes by kind in the moment that needs most, by this account.

        Activations are freed as gradients appear, so that is the end of the forward pass, where the loss is computed, the end
        of the last backward pass, or the update.
        """
        forward = {"gradients": self.held, "activations": self.activations, "working": self.working}
        backward = {"gradients": self.gradients, "working": self.late}
        update = {"update": self.update, "buffers": self.buffers}
        peak = max(forward, backward, update, key=lambda moment: sum(moment.values()))
        return {"weights": self.weights, "gathered": self.gathered, "optimizer": self.optimizer or 0, **peak}

    @property
    def total(self) -> int:
        """Peak bytes, by this account."""
        return sum(self.at_peak.values())


@dataclass(frozen=True)
class LayoutCost:
    """A layout's costs.

    ranks      by pipeline coordinate
    timeline   of the pipeline, in FLOPs of one micro-batch; None without a pipeline, and where nobody asked (`drawn`)
    model_flops  of the whole step over all ranks, by the convention of `models.costs.flops_per_token`
    """

    plan: StagePlan
    ranks: list[RankCost]
    timeline: Timeline | None
    model_flops: float


def layout_cost(
    model: Inventory,
    parallel: ParallelConfig,
    layout: Layout,
    job: Job,
    optimizer: OptimizerBytes,
    ranks: Sequence[int] | None = None,
) -> LayoutCost:
    """Estimate the costs of a legal layout. ranks: the pipeline coordinates whose costs are wanted; None: all."""
    plan = balanced_stages(model.shape, parallel, job.seq_len, job.policies)
    costs, cutter = stage_costs(model.shape, plan, job), Cutter(layout)
    # What more rounds than a few keep, those few keep already.
    count = repeated(parallel, job.micro_batches, least=4)
    order = pipeline_order(parallel, count) if plan.count > 1 else None
    of_ranks = [
        _rank_cost(rank, model, plan, parallel, layout, job, costs, cutter, order, optimizer)
        for rank in (range(parallel.pp) if ranks is None else ranks)
    ]
    tokens = job.tokens * job.micro_batches * layout.data_size
    return LayoutCost(plan, of_ranks, None, flops_per_token(model.shape, job.seq_len) * tokens)


def drawn(cost: LayoutCost, model: DecoderConfig, parallel: ParallelConfig, job: Job) -> LayoutCost:
    """Add the timeline of a pipeline to its costs."""
    if cost.plan.count == 1:
        return cost
    order = pipeline_order(parallel, job.micro_batches)
    return replace(cost, timeline=simulate(order, stage_costs(model, cost.plan, job)))


def stage_costs(model: DecoderConfig, plan: StagePlan, job: Job) -> list[Costs]:
    """Count the FLOPs per token of each stage's actions: gradients of inputs and of weights cost a forward pass each."""
    costs: list[Costs] = []
    shapes, known = model.blocks(), dict[tuple[int, str], tuple[float, float]]()
    for block, policy in zip(shapes, job.policies, strict=True):
        if (id(block), policy) not in known:
            fused = bool(job.fused_experts)
            again = recomputed_flops(block, policy, job.seq_len, fused_experts=fused, compiled=job.compiled)
            known[id(block), policy] = layer_flops(block, job.seq_len), again
    of_layers = [known[id(block), policy] for block, policy in zip(shapes, job.policies, strict=True)]
    for at, layers in enumerate(plan.layers):
        blocks = sum(of_layers[layer][0] for layer in layers)
        ends = (embedding_flops(model) if at == 0 else 0.0) + (head_flops(model) if at == plan.count - 1 else 0.0)
        again = sum(of_layers[layer][1] for layer in layers)
        costs.append(Costs(blocks + ends, blocks + ends + again, blocks + ends))
    return costs


def _rank_cost(
    rank: int,
    model: Inventory,
    plan: StagePlan,
    parallel: ParallelConfig,
    layout: Layout,
    job: Job,
    costs: Sequence[Costs],
    cutter: Cutter,
    order: Order | None,
    optimizer: OptimizerBytes,
) -> RankCost:
    mine, last = plan.held_by(rank), plan.count - 1
    held_by = {at: cutter.cut(model.stage(plan.layers[at], first=at == 0, last=at == last)) for at in mine}
    held = [group for groups in held_by.values() for group in groups]
    # A tied head that is not beside its embedding is borrowed: it has a shard and a gradient, but no optimizer state. So is the
    # cell of recurrent routers, but in the first stage with a mixture.
    lent = {"head"} if plan.count > 1 and model.shape.tied else set[str]()
    owner = next(iter(cell_stages(model.shape, plan)), None)
    own = [
        group
        for at, groups in held_by.items()
        for group in groups
        if group.name not in (lent if at == owner else {*lent, CELL})
    ]
    needs = optimizer(own, PRECISIONS[job.precision].accum_bytes)
    weights, parcels = _WeightBytes(0, 0, 0, 0, 0), 0
    for experts in (False, True):
        part = [group for group in held if group.experts is experts]
        if part:
            sent = _parcels(part, model, parallel, layout, job)
            weights, parcels = (
                weights.plus(_weight_bytes(part, model, parallel, layout, job, sent > 0, needs)),
                parcels + sent,
            )
    forward_pass = job.forward_pass(parallel)
    hidden = _hidden_bytes(model, parallel, job)
    tokens = job.micro_batches * job.tokens / parallel.cp / parallel.tp
    beside = parcels + _unsent_bytes(rank, plan, job, hidden)
    return RankCost(
        layers=[plan.layers[stage] for stage in mine],
        elements=sum(group.padded for group in own),
        experts=sum(group.padded for group in own if group.experts),
        flops=tokens * sum(costs[stage].forward + costs[stage].of("B") for stage in mine),
        weights=weights.shards,
        gathered=weights.gathered,
        gradients=weights.gradients,
        held=weights.left,
        optimizer=needs.state,
        activations=_activation_bytes(rank, model, plan, job, forward_pass, hidden, order),
        working=_working_bytes(model, job, forward_pass, loss=last in mine) + beside,
        late=_working_bytes(model, job, forward_pass, loss=False) + beside,
        update=weights.update,
        buffers=parcels,
        needs=needs,
    )


@dataclass(frozen=True)
class _WeightBytes:
    """Bytes of a rank's weights and gradients: fields of `RankCost`. left: its `held`."""

    shards: int
    gathered: int
    gradients: int
    left: int
    update: int

    def plus(self, other: _WeightBytes) -> _WeightBytes:
        """Add those of other weights."""
        mine, more = astuple(self), astuple(other)
        return _WeightBytes(*map(sum, zip(mine, more, strict=True)))


def _weight_bytes(
    held: Sequence[WeightGroup],
    model: Inventory,
    parallel: ParallelConfig,
    layout: Layout,
    job: Job,
    parcels: bool,
    needs: OptimizerNeeds,
) -> _WeightBytes:
    """Count weights that are held in one way: all experts that are dealt out, or all others."""
    if parallel.engine == "torch" and not uses_fsdp(parallel, layout, experts=held[0].experts):
        found = _whole_weights(held, layout, job, parcels=parcels, needs=needs)
        found = replace(found, gradients=found.gradients + level_bytes(held, parallel, layout, job))
        narrow = _narrow_gradients(held, layout, job, needs)
    else:
        found, narrow = _fully_sharded_weights(held, model, parallel, layout, job, parcels=parcels), False
    return replace(found, update=found.update + _update_bytes(held, job, needs, narrow=narrow))


def _narrow_gradients(held: Sequence[WeightGroup], layout: Layout, job: Job, needs: OptimizerNeeds) -> bool:
    """Return whether gradients of weights that lie whole go to the optimizer in the dtype of the computation."""
    sharing = layout.expert_weights * layout.expert_copies if held[0].experts else layout.gradient_ranks
    return needs.fused and job.narrow_gradients(sharing)


def _update_bytes(held: Sequence[WeightGroup], job: Job, needs: OptimizerNeeds, *, narrow: bool) -> int:
    """Count what updates of whole matrices take beside gradients. narrow: these are in the dtype of the computation"""
    unit, exact = PRECISIONS[job.precision].bytes, PRECISIONS[job.precision].accum_bytes
    element = {"none": 0, "computed": 2 * unit, "widened": exact * (2 if narrow else 1)}[needs.updates]
    return element * sum(shard.padded for group in held for shard in group.shards if shard.of.hidden) if element else 0


def _fully_sharded_weights(
    held: Sequence[WeightGroup], model: Inventory, parallel: ParallelConfig, layout: Layout, job: Job, *, parcels: bool
) -> _WeightBytes:
    """Count weights that FSDP2 or DeepSpeed hold. parcels: whether copy engines send them."""
    unit, exact = PRECISIONS[job.precision].bytes, PRECISIONS[job.precision].accum_bytes
    groups = {group.name: group.whole for group in held}
    whole = sum(groups.values())
    blocks = [count for group, count in groups.items() if group.startswith("layers.")]
    # One block computes while the next is on its way; what is not in a block stays, and through a pipeline everything.
    at_once = whole
    if layout.zero == 3 and parallel.pp == 1:
        # The embedding is given back after its lookup; a tied one stays with the head.
        embedding = 0 if model.shape.tied else groups.get("embed", 0)
        at_once = whole - sum(blocks) - embedding + max(embedding, sum(sorted(blocks)[-2:]))
    accumulates = parallel.pp > 1 or (job.micro_batches > 1 and layout.zero < 2)
    shards = sum(group.padded for group in held) * exact
    exchanged = parcels and job.precision == "bf16" and layout.zero >= 2
    moving = max(groups.values()) * (unit if exchanged else unit + exact)
    gradients = shards + (whole * exact if accumulates else moving)
    left = 0 if parallel.pp == 1 and job.micro_batches == 1 else whole * exact if accumulates else shards
    return _WeightBytes(shards, at_once * unit, gradients, left, update=shards)


def _whole_weights(
    held: Sequence[WeightGroup], layout: Layout, job: Job, *, parcels: bool, needs: OptimizerNeeds
) -> _WeightBytes:
    """Count weights that lie whole beside their masters. Of one dtype, the masters are a part of them.

    Gradients are added up whole. While a group's are on their way, as they were sent and as they are received, the next
    one's are computed.

    parcels: whether copy engines send them
    """
    unit, exact = PRECISIONS[job.precision].bytes, PRECISIONS[job.precision].accum_bytes
    whole, shards = sum(group.whole for group in held), sum(group.padded for group in held) * exact
    sharing = layout.expert_weights * layout.expert_copies if held[0].experts else layout.gradient_ranks
    accumulates, shared = job.micro_batches > 1 and layout.zero < 2, sharing > 1
    gathered = whole * unit if unit != exact else max(0, whole * exact - shards)
    away = 2 * (exact if accumulates else unit) if shared and not parcels else 0
    moving = max(group.whole for group in held) * (away + (0 if shared and accumulates else unit))
    gradients = shards + (whole * exact if accumulates and shared else 0) + moving
    update = shards
    if _narrow_gradients(held, layout, job, needs):
        gradients = update = whole * unit  # they go to the optimizer as they are
    left = 0 if job.micro_batches == 1 else whole * exact if accumulates else shards
    if job.masters != "full":  # they exist during the update alone, if it needs them
        kept, made = shards // 2 if job.masters == "bf16_kahan" else 0, 0 if needs.rounded else shards
        return _WeightBytes(kept, gathered, gradients, left, update + made)
    return _WeightBytes(shards, gathered, gradients, left, update)


def level_bytes(held: Sequence[WeightGroup], parallel: ParallelConfig, layout: Layout, job: Job) -> int:
    """Count what an exchange of gradients in levels takes besides a direct one (`torch/exchange.py`), in bytes.

    held: all experts that are dealt out, or all other weights. A group's sums after its first level are sent and received; if
    others than the last level follow, they are sorted before, into another array. Groups before it are at later levels.
    """
    if job.per_host is None or not parallel.exchanges_rows:
        return 0
    *inner, _ = gradient_levels(parallel, layout, job.per_host, experts=held[0].experts)
    sums, found, arrays = max(group.whole for group in held), 0, 3 if len(inner) > 1 else 2
    for size in inner:
        sums = -(-sums // size)
        found += arrays * sums * PRECISIONS[job.precision].accum_bytes
        arrays = 2
    return found


def _hidden_bytes(model: Inventory, parallel: ParallelConfig, job: Job) -> int:
    """Count the bytes of one micro-batch's hidden states, as they pass between stages."""
    tokens, cut = job.tokens // parallel.cp, parallel.tp if parallel.sequence_parallel else 1
    return tokens * model.shape.stream_width * PRECISIONS[job.precision].bytes // cut


def _activation_bytes(
    rank: int,
    model: Inventory,
    plan: StagePlan,
    job: Job,
    forward_pass: ForwardPass,
    hidden: int,
    order: Order | None,
) -> int:
    """Estimate what a rank's stages keep for backward passes, at most at once."""
    blocks_keep = _bytes_kept(model.shape, job.policies, forward_pass)
    # A stage holds what it sent, too, until the micro-batch's backward pass.
    sizes = {
        stage: sum(blocks_keep[layer] for layer in plan.layers[stage]) + (hidden if stage < plan.count - 1 else 0)
        for stage in plan.held_by(rank)
    }
    return round(peak(order[rank], lambda stage: sizes[stage]) if order else sum(sizes.values()))


def _bytes_kept(model: DecoderConfig, policies: Sequence[str], forward_pass: ForwardPass) -> list[int]:
    """Estimate what each block keeps of one micro-batch."""
    known, blocks = dict[tuple[int, str], int](), model.blocks()
    for block, policy in zip(blocks, policies, strict=True):
        if (id(block), policy) not in known:
            known[id(block), policy] = block_bytes(block, forward_pass, policy)
    return [known[id(block), policy] for block, policy in zip(blocks, policies, strict=True)]


def _working_bytes(model: Inventory, job: Job, forward_pass: ForwardPass, *, loss: bool) -> int:
    """Estimate what lives for moments. loss: whether the rank computes it.

    A block's backward pass holds what policy "none" keeps (computed again or fetched), and gradients of about as much.
    """
    computed_again = bool({"full", "offload"} & set(job.policies))
    unfused = replace(forward_pass, fused_swiglu=False)
    working = max(_bytes_kept(model.shape, ["none"] * model.shape.layers, unfused)) * (2 if computed_again else 1)
    return max(working, loss_bytes(model.shape, forward_pass)) if loss else working


def _unsent_bytes(rank: int, plan: StagePlan, job: Job, hidden: int) -> int:
    """Count what torch's schedules of several stages a rank have sent: they wait for it only when the step ends."""
    if plan.count == len(set(plan.ranks)):
        return 0
    last, mine = plan.count - 1, plan.held_by(rank)
    away = sum(plan.ranks[other] != rank for stage in mine for other in (stage - 1, stage + 1) if 0 <= other <= last)
    return hidden * job.micro_batches * away


def _parcels(held: Sequence[WeightGroup], model: Inventory, parallel: ParallelConfig, layout: Layout, job: Job) -> int:
    """Count the communication buffers of copy engines (`transport.py`), besides weights, in bytes.

    Whole weights need buffers for the largest group's gradients, sent and received. FSDP2 needs buffers for two gathered groups
    and, in bf16 under ZeRO-2 and 3, for exchanged gradients. Ranks on several hosts are counted too, though they use none.
    """
    if parallel.engine != "torch" or not parallel.copy_engines or held[0].ranks == 1:
        return 0
    groups: dict[str, int] = {}
    for group in held:
        apart = group.name.startswith("layers.") or (group.name == "embed" and not model.shape.tied)
        name = group.name if apart else "the rest"
        groups[name] = groups.get(name, 0) + group.padded * group.ranks
    unit, largest = PRECISIONS[job.precision].bytes, max(groups.values())
    if not uses_fsdp(parallel, layout, experts=held[0].experts):
        return 2 * largest * (unit if job.micro_batches == 1 else PRECISIONS[job.precision].accum_bytes)
    exchanges = job.precision == "bf16" and layout.zero >= 2 and parallel.pp == 1
    return (4 if exchanges else 2) * largest * unit
