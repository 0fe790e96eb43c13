"""Search the layouts of a run that fit a cluster, and rank them by predicted time. Imports no torch.

Every combination of the axes is planned by memory first. What fits is bounded from below by its time without the pipeline's
waiting, and only the most promising are simulated: a layout whose bound is slower than the ones found need not be.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..checkpoint.config import CheckpointConfig
from ..models.costs import parameter_count
from ..parallel.config import ParallelConfig
from ..parallel.layout import Layout
from ..parallel.pipeline.stages import legal_micro_batches, splits_backward
from ..parallel.policies import MIXED
from .cluster import GIB, ClusterConfig
from .cost import layout_cost
from .engines import engine_cost
from .memory import Job, OptimizerBytes
from .parameters import Inventory
from .prediction import Prediction, usable_bytes
from .step_time import Matrices, Step, step_time

LAYOUT_KEYS = (
    "parallel.engine", "parallel.tp", "parallel.pp", "parallel.schedule", "parallel.stages_per_rank", "parallel.cp",
    "parallel.ep", "parallel.zero", "parallel.replicate", "parallel.offload", "parallel.offload_weights",
)  # fmt: skip
"""Keys that tell layouts apart. Of each layout the fastest micro-batch and activation policy are kept."""
KEYS = (*LAYOUT_KEYS, "batch.micro", "trainer.activation")
"""Keys that the search varies: placement, which changes what a run costs and not what it computes."""
MICROS = (1, 2, 4, 8, 16, 32)
LONG = 32768  # positions of a sample from which context parallelism is tried, or where there are more ranks than samples
LEAST_SLICE = 4096  # positions of a context-parallel rank
MOST_PIPELINE = 64
MOST_GPUS = 16384  # of a cluster that is proposed where nothing fits
Settings = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Question:
    """The run whose layouts are searched.

    job        its work; micro-batches and policies are the search's
    samples    of the global batch
    passes     (layout's data ranks, parallel config, micro) → micro-batches of each rank in a step
    legal      (parallel config, GPUs) → whether the run can have this layout on so many
    fixed      keys that are not varied, with their values
    engines    that can run it
    length, matrices, saving  see `step_time.Step`
    """

    model: Inventory
    parallel: ParallelConfig
    job: Job
    samples: int
    tokens: float
    optimizer: OptimizerBytes
    cluster: ClusterConfig
    passes: Callable[[int, ParallelConfig, int], int]
    legal: Callable[[ParallelConfig, int], bool]
    fixed: Settings = field(default_factory=dict[str, Any])
    engines: Sequence[str] = ("torch",)
    length: float | None = None
    matrices: Matrices | None = None
    saving: CheckpointConfig | None = None


@dataclass(frozen=True)
class Candidate:
    """A layout with its micro-batch and activation policy, and what it costs."""

    settings: Settings
    prediction: Prediction

    @property
    def layout(self) -> tuple[Any, ...]:
        """The settings that tell its layout apart."""
        return tuple(self.settings[key] for key in LAYOUT_KEYS)


@dataclass(frozen=True)
class Found:
    """The result of a search: the best candidates, fastest first; where none fits, the least; how many were planned."""

    best: list[Candidate]
    least: Candidate | None
    planned: int


def search(question: Question, most: int) -> Found:
    """Find the fastest candidates that fit, one for each layout."""
    bounded: list[tuple[float, Candidate]] = []
    planned = 0
    for parallel in layouts(question):
        for candidate in _sized(question, parallel):
            planned += 1
            if candidate.prediction.fits:
                bounded.append((step_time(candidate.prediction.step, simulated=False).seconds, candidate))
    bounded.sort(key=lambda found: found[0])
    best: dict[tuple[Any, ...], Candidate] = {}
    for bound, candidate in bounded:
        ranked = sorted(best.values(), key=lambda one: one.prediction.seconds)
        if len(ranked) >= most and bound > ranked[most - 1].prediction.seconds:
            break
        known = best.get(candidate.layout)
        if known is None or candidate.prediction.seconds < known.prediction.seconds:
            best[candidate.layout] = candidate
    ranked = sorted(best.values(), key=lambda one: one.prediction.seconds)[:most]
    return Found(ranked, None if ranked else _least(question), planned)


def _least(question: Question) -> Candidate | None:
    """Return the candidate that needs least memory; None where no layout is legal."""
    tight = replace(question, fixed=_tight(question))
    found = (each for parallel in layouts(tight) for each in _sized(tight, parallel, hopeless=True))
    return min(found, key=lambda each: each.prediction.bytes, default=None)


def _tight(question: Question) -> Settings:
    """Return the settings that need least memory, as far as nothing else was typed."""
    return {"trainer.activation": "full", "batch.micro": 1, **question.fixed}


def layouts(question: Question) -> Iterator[ParallelConfig]:
    """Yield every legal layout of the cluster's GPUs."""
    gpus, node = question.cluster.gpus, question.cluster.gpus_per_node
    layers, length = question.model.shape.layers, question.job.seq_len
    for engine in _choices(question, "parallel.engine", question.engines):
        alone = engine == "deepspeed"
        for tp in _choices(question, "parallel.tp", [1] if alone else _divisors(min(gpus, node))):
            for pp in _choices(question, "parallel.pp", [1] if alone else _divisors(gpus, min(layers, MOST_PIPELINE))):
                long = length >= LONG or gpus // (tp * pp) > question.samples
                cps = [cp for cp in _divisors(gpus, 2 * node) if cp == 1 or length // cp >= LEAST_SLICE] if long else [1]
                cps = [1] if alone else cps
                for cp in _choices(question, "parallel.cp", cps):
                    if gpus % (tp * pp * cp) == 0:
                        sized = replace(question.parallel, engine=engine, tp=tp, pp=pp, cp=cp, stage_layers=None)
                        yield from _variants(question, sized, gpus // (tp * pp * cp))


def _variants(question: Question, sized: ParallelConfig, data: int) -> Iterator[ParallelConfig]:
    """Yield the schedules, ZeRO stages and hybrid shardings of these sizes, as far as they are legal."""
    alone = data * sized.cp == 1 and sized.engine == "torch"
    zeros = [question.parallel.zero or 1] if alone else [1] if sized.pp > 1 else [1, 2, 3]
    for schedule, chunks in _schedules(question, sized):
        for zero in _choices(question, "parallel.zero", zeros):
            shards = [1] if alone or sized.engine == "deepspeed" or zero == 0 else _replicas(question, sized, data)
            for replicate in _choices(question, "parallel.replicate", shards):
                ranks = data // (replicate if zero else 1) * sized.cp * sized.tp
                eps = _choices(question, "parallel.ep", _expert_sizes(question, sized, ranks))
                for ep, (offload, weights) in itertools.product(eps, _offloads(question, sized, zero)):
                    found = replace(
                        sized, schedule=schedule, stages_per_rank=chunks, zero=zero, replicate=replicate, ep=ep,
                        offload=offload, offload_weights=weights,
                    )  # fmt: skip
                    if question.legal(found, question.cluster.gpus):
                        yield found


def _expert_sizes(question: Question, sized: ParallelConfig, ranks: int) -> list[int]:
    """List sizes of expert parallelism: none, a node's ranks, and the most that the experts of a mixture and `ranks` allow."""
    shape = question.model.shape
    if not shape.mixture_layers() or sized.engine != "torch":
        return [1]
    most = math.gcd(ranks, shape.experts.count)
    return sorted({1, math.gcd(most, question.cluster.gpus_per_node), most})


def _choices(question: Question, key: str, values: Sequence[Any]) -> Sequence[Any]:
    return [question.fixed[key]] if key in question.fixed else values


def _divisors(number: int, most: int | None = None) -> list[int]:
    small = [size for size in range(1, math.isqrt(number) + 1) if number % size == 0]
    return [size for size in sorted({*small, *(number // size for size in small)}) if size <= (most or number)]


def _schedules(question: Question, sized: ParallelConfig) -> list[tuple[str, int | None]]:
    given = question.parallel.schedule, question.parallel.stages_per_rank
    if sized.pp == 1:
        return [(given[0], None)]
    if "parallel.schedule" in question.fixed or "parallel.stages_per_rank" in question.fixed:
        return [given]
    layers = question.model.shape.layers
    found: list[tuple[str, int | None]] = [("1f1b", None)]
    found += [("interleaved", chunks) for chunks in (2, 4) if sized.pp * chunks <= layers]
    return found if question.job.compiled else [*found, ("zbv", None)]


def _replicas(question: Question, sized: ParallelConfig, data: int) -> list[int]:
    """List numbers of copies: one, and those whose shards lie on one node, or on four."""
    node = question.cluster.gpus_per_node
    found = [1]
    for nodes in (1, 4):
        shard = max(1, nodes * node // (sized.tp * sized.cp))
        if shard < data and data % shard == 0:
            found.append(data // shard)
    return sorted(set(found))


def _offloads(question: Question, sized: ParallelConfig, zero: int) -> list[tuple[str, str]]:
    if "parallel.offload" in question.fixed or "parallel.offload_weights" in question.fixed:
        return [(question.parallel.offload, question.parallel.offload_weights)]
    if max(sized.tp, sized.pp, sized.cp) > 1 or zero != 3:
        return [("none", "none")]
    return [("none", "none"), ("cpu", "none")] + ([("cpu", "cpu")] if sized.engine == "deepspeed" else [])


def _sized(question: Question, parallel: ParallelConfig, *, hopeless: bool = False) -> Iterator[Candidate]:
    """Plan a layout with every micro-batch and policy, up to the first micro-batch that does not fit in any way.

    hopeless: whether to plan what can't fit, too
    """
    layout = Layout.plan(parallel, question.cluster.gpus)
    if not hopeless and not _may_fit(question, parallel, layout):
        return
    share = -(-question.samples // layout.data_size)
    micros = [micro for micro in MICROS if micro <= share and share % micro == 0]
    for micro in _choices(question, "batch.micro", micros):
        many = question.passes(layout.data_size, parallel, micro)
        if not legal_micro_batches(parallel, many):
            continue
        found = _lightest(question, parallel, layout, micro, many)
        yield from found
        if not found[-1].prediction.fits:
            return


def _lightest(question: Question, parallel: ParallelConfig, layout: Layout, micro: int, many: int) -> list[Candidate]:
    """Plan policies as far as need be: the last is the fastest that fits, or the one that keeps least."""
    *others, least = _policies(question, parallel)
    found = [planned(question, parallel, layout, micro, many, least)]
    if not found[0].prediction.fits:
        return found
    for policy in others:
        candidate = planned(question, parallel, layout, micro, many, policy)
        if candidate.prediction.fits:
            return [candidate]
    return found


def _policies(question: Question, parallel: ParallelConfig) -> Sequence[str]:
    halves = splits_backward(parallel)
    return _choices(question, "trainer.activation", [each for each in MIXED if not (halves and each == "selective")])


def _may_fit(question: Question, parallel: ParallelConfig, layout: Layout) -> bool:
    """Return whether masters and optimizer state alone could fit; where nothing is offloaded."""
    if parallel.offload != "none":
        return True
    whole = question.model.shape.mixture_layers() and parallel.ep == 1  # tensor-parallel ranks then all have the experts
    ranks = parallel.pp * (1 if whole else parallel.tp) * layout.weight_ranks
    return 8 * parameter_count(question.model.shape) / ranks <= question.cluster.memory * GIB


def planned(question: Question, parallel: ParallelConfig, layout: Layout, micro: int, many: int, policy: str) -> Candidate:
    """Plan one candidate."""
    policies, per_host = [policy] * question.model.shape.layers, question.cluster.gpus_per_node
    job = replace(question.job, micro=micro, micro_batches=many, policies=policies, per_host=per_host)
    ends = sorted({0, parallel.pp // 2, parallel.pp - 1})  # the others are like these
    cost = layout_cost(question.model, parallel, layout, job, question.optimizer, ends)
    ranks, away = zip(*(engine_cost(rank, question.model, parallel, layout, job) for rank in cost.ranks), strict=True)
    cost = replace(cost, ranks=list(ranks))
    step = Step(question.model.shape, parallel, layout, job, cost, away[0], question.cluster, question.length)
    step = replace(step, matrices=question.matrices, saving=question.saving)
    values = {f"parallel.{name}": getattr(parallel, name) for name in (key.partition(".")[2] for key in LAYOUT_KEYS)}
    settings = {**values, "batch.micro": micro, "trainer.activation": policy}
    return Candidate(settings, Prediction(step, question.samples, question.tokens))


def larger_sizes(cluster: ClusterConfig, most: int = MOST_GPUS) -> list[int]:
    """List the larger numbers of GPUs that are tried where nothing fits: parts of a node, and 2ⁿ or 1½ · 2ⁿ nodes."""
    node = cluster.gpus_per_node
    parts = [size for size in (1, 2, 4) if size < node] if cluster.gpus < node else []
    powers = range(max(1, most // node).bit_length())
    nodes = sorted({round(base * 2**power) for power in powers for base in (1, 1.5)})
    return [gpus for gpus in [*parts, *(count * node for count in nodes)] if cluster.gpus < gpus <= most]


def smallest_cluster(question: Question) -> Candidate | None:
    """Find the first of `larger_sizes` of the same GPUs on which something fits; None if it fits none of them.

    A size between two of them may be enough, too.
    """
    for gpus in larger_sizes(question.cluster):
        larger = replace(question, cluster=replace(question.cluster, gpus=gpus))
        tight = replace(larger, fixed=_tight(question))
        for parallel in layouts(tight):
            found = next((each for each in _sized(tight, parallel) if each.prediction.fits), None)
            if found is not None:
                return found
    return None


def difference(one: Candidate, other: Candidate, least: float = 0.005) -> list[str]:
    """Word why one candidate is faster than another: the parts whose times differ, largest first, as shares of the one's step.

    A part without sign is one that the other has more of.
    """
    ours, theirs = one.prediction.time.parts, other.prediction.time.parts
    whole = one.prediction.seconds
    found = {name: (theirs.get(name, 0.0) - ours.get(name, 0.0)) / whole for name in {**ours, **theirs}}
    ranked = sorted(found.items(), key=lambda item: -abs(item[1]))
    return [f"{name} {share:+.1%}" for name, share in ranked if abs(share) >= least][:4]


def limit_of(cluster: ClusterConfig) -> float:
    """Return the bytes of a GPU that a plan may take."""
    return usable_bytes(cluster.memory * GIB)
