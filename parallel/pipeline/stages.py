"""Pipeline stages: the schedules, which rank holds which stage, and how layers are divided among stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from ...models.config import DecoderConfig
from ...models.costs import embedding_flops, head_flops, layer_flops, recomputed_flops
from ..config import ParallelConfig

Layers = range


@dataclass(frozen=True)
class PipelineSchedule:
    """The needs and properties of a pipeline schedule.

    torch_name       name of the class in `torch.distributed.pipelining`
    stages_per_rank  stages that each rank holds when the config doesn't say
    fixed            whether it runs with that number only
    folded           stages run down the ranks and back up (a V), so rank 0 holds the first and the last;
                     otherwise stage s is on rank s modulo the number of ranks
    splits_backward  gradients of inputs and of weights are computed at different times (zero bubble, arXiv 2401.10241)
    """

    torch_name: str
    stages_per_rank: int
    fixed: bool
    folded: bool = False
    splits_backward: bool = False


SCHEDULES = {
    "gpipe": PipelineSchedule("GPipe", 1, fixed=True),
    "1f1b": PipelineSchedule("1F1B", 1, fixed=True),
    "interleaved": PipelineSchedule("Interleaved1F1B", 2, fixed=False),
    "zb": PipelineSchedule("InterleavedZeroBubble", 2, fixed=False, splits_backward=True),
    "zbv": PipelineSchedule("ZBVZeroBubble", 2, fixed=True, folded=True, splits_backward=True),
    "dualpipev": PipelineSchedule("DualPipeV", 2, fixed=True, folded=True, splits_backward=True),
}


def schedule_of(parallel: ParallelConfig) -> PipelineSchedule:
    """Return the schedule of `parallel.schedule`; the config has been checked."""
    return SCHEDULES[parallel.schedule]


def splits_backward(parallel: ParallelConfig) -> bool:
    """Return whether there is a pipeline whose backward passes run in two halves."""
    return parallel.pp > 1 and schedule_of(parallel).splits_backward


def stage_count(parallel: ParallelConfig) -> int:
    """Return the number of stages of the whole pipeline."""
    return parallel.pp * (parallel.stages_per_rank or schedule_of(parallel).stages_per_rank) if parallel.pp > 1 else 1


def stage_ranks(parallel: ParallelConfig) -> list[int]:
    """Return the pipeline coordinate of the rank that holds each stage, in stage order."""
    count = stage_count(parallel)
    if schedule_of(parallel).folded and parallel.pp > 1:
        return [stage if stage < parallel.pp else count - 1 - stage for stage in range(count)]
    return [stage % parallel.pp for stage in range(count)]


def legal_micro_batches(parallel: ParallelConfig, count: int) -> bool:
    """Return whether the schedule can run this number of micro-batches per step and rank."""
    if count < 1:
        return False
    if parallel.pp == 1 or parallel.schedule in ("gpipe", "zbv"):
        return True
    if parallel.schedule in ("1f1b", "dualpipev"):
        return count >= stage_count(parallel)
    # The interleaved schedules go round in `count // pp` rounds of equal size.
    return count % max(1, count // parallel.pp) == 0


def stage_split(layers: int, cost: float, ends: Sequence[float], ranks: Sequence[int]) -> list[Layers]:
    """Cut a row of equal layers into consecutive stages so that the most expensive rank costs as little as possible.

    cost: of a layer; ends: what each stage costs besides its layers (embedding, head); ranks: that hold the stages.
    Every stage gets one layer at least. The others go one by one to the cheapest rank, which is optimal for equal items,
    and there to its cheapest stage. Ties go to the last stage, where schedules keep fewer activations alive.
    """
    assert 1 <= len(ends) <= layers, f"{layers} layers can't fill {len(ends)} stages"
    counts, held = [1] * len(ends), dict[int, list[int]]()
    for stage, rank in enumerate(ranks):
        held.setdefault(rank, []).append(stage)
    of_stage = [end + cost for end in ends]
    of_rank = [sum(of_stage[mine] for mine in held[rank]) for rank in ranks]  # of each stage's rank
    for _ in range(layers - len(ends)):
        next_to = min(reversed(range(len(ends))), key=lambda stage: (of_rank[stage], of_stage[stage]))
        counts[next_to] += 1
        of_stage[next_to] = ends[next_to] + cost * counts[next_to]
        together = held[ranks[next_to]]
        whole = sum(of_stage[mine] for mine in together)
        for mine in together:
            of_rank[mine] = whole
    return [range(start, stop) for start, stop in pairwise([0, *accumulate(counts)])]


@dataclass(frozen=True)
class StagePlan:
    """The layers of each stage, and the pipeline coordinate of the rank that holds it. Both in stage order."""

    layers: list[Layers]
    ranks: list[int]

    @property
    def count(self) -> int:
        """Number of stages."""
        return len(self.layers)

    def held_by(self, rank: int) -> list[int]:
        """List the indices of the stages on this pipeline rank, ascending."""
        return [stage for stage, holder in enumerate(self.ranks) if holder == rank]

    @classmethod
    def single(cls, layers: int) -> StagePlan:
        """Plan one stage of all layers."""
        return cls([range(layers)], [0])

    @classmethod
    def of(cls, parallel: ParallelConfig, layers: int, cost: float, first: float, last: float) -> StagePlan:
        """Plan by `parallel.stage_layers`, or balance: a layer costs `cost`, embedding and head cost `first` and `last`."""
        ranks = stage_ranks(parallel)
        if parallel.stage_layers is None:
            ends = [0.0] * len(ranks)
            ends[0] += first
            ends[-1] += last
            return cls(stage_split(layers, cost, ends, ranks), ranks)
        return cls([range(start, stop) for start, stop in pairwise([0, *accumulate(parallel.stage_layers)])], ranks)


def balanced_stages(model: DecoderConfig, parallel: ParallelConfig, seq_len: int, policies: Sequence[str]) -> StagePlan:
    """Give each stage its layers by `parallel.stage_layers`, or so that the slowest rank is as fast as possible.

    policies: the activation policy of every block. A backward pass costs two forward passes plus the recomputation.
    Policies that differ are spread evenly, so every layer is taken to cost their mean.
    """
    costs = [3.0 * layer_flops(block, seq_len) for block in model.blocks()]
    recomputed = [recomputed_flops(block, policy, seq_len) for block, policy in zip(model.blocks(), policies, strict=True)]
    layer = sum((*costs, *recomputed)) / model.layers
    return StagePlan.of(parallel, model.layers, layer, 3.0 * embedding_flops(model), 3.0 * head_flops(model))


def cell_stages(model: DecoderConfig, plan: StagePlan) -> list[int]:
    """List the stages that use what recurrent routers share; the first of them owns it. Without such routers there is none."""
    if not model.experts.carried_dim:
        return []
    return [index for index, layers in enumerate(plan.layers) if any(map(model.experts.has_mixture, layers))]
