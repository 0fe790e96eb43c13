"""Time of one block's passes over a micro-batch on one rank, by named parts. Imports no torch.

Shape legend: T tokens of the micro-batch on a rank before tensor parallelism cuts them, D the stream's width, Q and K of all
query and of all key heads, F the feed-forward's, t ranks of tensor parallelism.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ..models.mixture.config import MixtureConfig
from ..models.mixture.costs import recomputed_matrices
from ..models.part_config import AttentionConfig, BlockConfig, LatentAttentionConfig
from ..parallel.config import ParallelConfig
from ..parallel.context.traffic import position_bytes
from ..parallel.layout import Layout
from .cluster import Rates
from .kernel_time import Kernels
from .memory import Job
from .network import Group, group, group_of
from .software import Software

KERNELS = 15
"""Kernels of a compiled block's forward pass; a backward pass has twice as many."""
MIXTURE_LAUNCHES = 1.4
"""Operations that a mixture's block launches both ways, of those of a dense one: routing, sorting, gathering and experts.

Counted in eager blocks (`tests/planner/test_block_launches.py`), and taken for compiled ones, too.
"""

Parts = Mapping[str, float]
"""Name of a part → seconds."""


def summed(*each: Parts) -> dict[str, float]:
    """Add up parts by name."""
    total = dict[str, float]()
    for parts in each:
        for name, seconds in parts.items():
            total[name] = total.get(name, 0.0) + seconds
    return total


def scaled(parts: Parts, factor: float) -> dict[str, float]:
    """Multiply every part."""
    return {name: seconds * factor for name, seconds in parts.items()}


@dataclass(frozen=True)
class BlockTime:
    """Seconds of a block's forward pass, and of its backward pass to the input and to the weights."""

    forward: Parts
    to_input: Parts
    to_weight: Parts


@dataclass(frozen=True)
class BlockWork:
    """The work of a block on a rank, besides the block itself.

    tokens      T
    length      mean positions of a document; seq_len where documents are not told apart
    fused       whether SwiGLU is computed inside the products around it
    fused_experts, compiled  see `models.costs.ForwardPass`
    tp, cp, ep  groups of its exchanges
    """

    tokens: float
    length: float
    policy: str
    float8: bool
    fused: bool
    parallel: ParallelConfig
    software: Software
    tp: Group
    cp: Group
    ep: Group | None = None
    fused_experts: bool = False
    compiled: bool = True

    @classmethod
    def of(
        cls,
        job: Job,
        parallel: ParallelConfig,
        layout: Layout,
        software: Software,
        kernels: Kernels,
        *,
        length: float,
        policy: str,
    ) -> BlockWork:
        """Derive the work of a run's blocks under one activation policy. length: as above."""
        cluster = kernels.cluster
        return cls(
            tokens=job.tokens / parallel.cp,
            length=length,
            policy=policy,
            float8=job.float8 != "none",
            fused=job.fused,
            parallel=parallel,
            software=software,
            tp=group_of(cluster, layout, "tp"),
            cp=group_of(cluster, layout, "cp"),
            ep=group(cluster, layout.ep, 1, layout.world_size) if layout.ep > 1 else None,  # the innermost as experts see it
            fused_experts=bool(job.fused_experts),
            compiled=job.compiled,
        )


def block_time(block: BlockConfig, work: BlockWork, kernels: Kernels) -> BlockTime:
    """Predict a block's passes."""
    forward = _forward(block, work, kernels)
    to_weight = {"products": forward.get("products", 0.0), "experts": forward.get("experts", 0.0)}
    to_input = dict(to_weight)
    to_input["attention"] = _attention(block, work, kernels, backward=True)
    to_input["pointwise"] = kernels.pointwise(_traffic(block, work, kernels.unit, backward=True))
    to_input["tensor exchange"] = forward.get("tensor exchange", 0.0)
    to_input["expert exchange"] = forward.get("expert exchange", 0.0)
    to_input["context exchange"] = _context_exchange(block, work, kernels, to_input["attention"], backward=True)
    to_input["recomputation"] = _recomputation(block, work, kernels, forward)
    if work.policy == "offload":
        to_input["recomputation"] = 0.0
    rates = kernels.cluster.rates
    for parts, passes in ((forward, 1), (to_input, 2)):
        parts["launches"] = KERNELS * passes * work.software.launches * rates.tail / rates.speed
    return BlockTime(forward, _present(to_input), _present(to_weight))


def host_seconds(block: BlockConfig, policy: str, software: Software, rates: Rates) -> float:
    """Return the seconds in which the host launches a block's passes over one micro-batch under an activation policy.

    Selective checkpointing launches few kernels again, and is counted as if it launched none.
    """
    passes = 4 if policy == "full" else 3
    dense = rates.launch_eager if software.eager else rates.launch * software.launches
    return passes * dense * (MIXTURE_LAUNCHES if isinstance(block.ffn, MixtureConfig) else 1.0)


def _present(parts: Parts) -> dict[str, float]:
    return {name: seconds for name, seconds in parts.items() if seconds}


def _forward(block: BlockConfig, work: BlockWork, kernels: Kernels) -> dict[str, float]:
    product = kernels.float8_product if work.float8 else kernels.product
    parts = {"products": sum(product(work.tokens, out, inner) for out, inner in dense_products(block, work.parallel.tp))}
    if isinstance(block.ffn, MixtureConfig):
        parts["experts"] = _experts(block.ffn, work, kernels)
        if work.ep is not None:
            size = _local_tokens(work) * block.ffn.keys.top_k * block.ffn.dim * kernels.unit
            parts["expert exchange"] = 2 * work.ep.exchange(size, 1)
    parts["attention"] = _attention(block, work, kernels)
    parts["pointwise"] = kernels.pointwise(_traffic(block, work, kernels.unit))
    parts["tensor exchange"] = _tensor_exchange(block, work, kernels.unit)
    parts["context exchange"] = _context_exchange(block, work, kernels, parts["attention"])
    return _present(parts)


def dense_products(block: BlockConfig, tp: int) -> Iterator[tuple[float, float]]:
    """Yield (output width, input width) of each product of every token with weights on one of `tp` ranks."""
    part, dim = block.attention, block.attention.dim
    if isinstance(part, AttentionConfig):
        kv_width = max(part.kv_heads, tp) * part.head_dim
        yield part.q_width / tp, dim
        yield kv_width / tp, dim
        yield kv_width / tp, dim
        yield dim, part.q_width / tp
    else:
        yield from _latent_products(part, tp)
    if not isinstance(block.ffn, MixtureConfig):
        yield block.ffn.ffn_dim / tp, dim
        yield block.ffn.ffn_dim / tp, dim
        yield dim, block.ffn.ffn_dim / tp


def _latent_products(part: LatentAttentionConfig, tp: int) -> Iterator[tuple[float, float]]:
    q_width, latent = part.heads * part.head_dim, part.kv_norm.width
    if part.q_norm is None:
        yield q_width / tp, part.dim
    else:
        yield part.q_norm.width, part.dim
        yield q_width / tp, part.q_norm.width
    yield latent + part.rotary.width, part.dim
    yield part.heads * (part.nope_dim + part.value_dim) / tp, latent
    yield part.dim, part.heads * part.value_dim / tp


def _local_tokens(work: BlockWork) -> float:
    """Return the tokens whose feed-forward a rank of a mixture computes: tensor-parallel ranks share them."""
    return work.tokens / (work.parallel.tp if work.parallel.sequence_parallel else 1)


def _experts(part: MixtureConfig, work: BlockWork, kernels: Kernels) -> float:
    """Predict router, grouped products and shared experts of one forward pass."""
    tokens, width, dim, keys = _local_tokens(work), part.expert.ffn_dim, part.dim, part.keys
    experts = keys.count // (work.ep.ranks if work.ep is not None else 1)
    seconds = kernels.product(tokens, keys.count, dim)
    shared = kernels.float8_product if work.float8 else kernels.product  # a feed-forward as any other
    routed = shared if work.software.float8_experts else kernels.product
    into = part.products - 1
    seconds += into * routed(tokens * keys.top_k, width, dim, groups=experts)
    seconds += routed(tokens * keys.top_k, dim, width, groups=experts)
    if keys.shared:
        seconds += into * shared(tokens, width * keys.shared, dim) + shared(tokens, dim, width * keys.shared)
    return seconds


def _attention(block: BlockConfig, work: BlockWork, kernels: Kernels, *, backward: bool = False) -> float:
    part, length, tp = block.attention, work.length, work.parallel.tp
    seen = min(length, 2.0 * part.window) if part.window is not None else length
    whole = work.tokens * part.score_flops(round(length)) / tp
    if not work.software.flash:
        # Scores of all pairs, masked ones too, by products of each head, and what is pointwise in memory.
        times = 2 if backward else 1
        rows = work.tokens * part.heads / tp
        traffic = times * work.software.scores * kernels.unit * rows * length
        arithmetic = times * whole / (kernels.cluster.peak(kernels.precision) * kernels.cluster.rates.products * 0.7)
        return arithmetic / kernels.cluster.rates.speed + kernels.pointwise(traffic)
    return kernels.attention(whole / 2, part.head_dim, seen, backward=backward)


def _traffic(block: BlockConfig, work: BlockWork, unit: int, *, backward: bool = False) -> float:
    """Count the bytes that pointwise kernels of one pass read and write.

    Per token: norms 2 D forward and 3 D backward, residual sums 3 D each, rotary positions 2 (Q + K), SwiGLU 3 F forward and
    6 F backward (a fifth where products do it, for their weights' rows). A mixture moves each chosen copy of a token twice
    there and back.
    """
    tp, dim = work.parallel.tp, block.attention.dim
    cut = tp if work.parallel.sequence_parallel else 1
    norms = 2 * (block.norms_before + block.norms_after)
    stream = (norms * (3 if backward else 2) + 2 * 3) * dim / cut
    part = block.attention
    heads = part.heads * part.head_dim + (part.kv_width if isinstance(part, AttentionConfig) else part.heads * part.head_dim)
    rotary = 2 * heads / tp
    ffn = block.ffn.ffn_dim / tp
    gate = (6 if backward else 3) * ffn
    if work.fused and block.ffn.is_plain_swiglu:
        gate *= 0.2
    moved = 2 * block.ffn.dispatched / cut
    return work.tokens * unit * (stream + rotary + gate + moved) * work.software.passes


def _tensor_exchange(block: BlockConfig, work: BlockWork, unit: int) -> float:
    """Predict the exchanges of one pass: a gather and a scatter of the stream around each part, or an all-reduce after it."""
    if work.parallel.tp == 1:
        return 0.0
    parts = 1 if isinstance(block.ffn, MixtureConfig) else 2
    size = work.tokens * block.attention.dim * unit
    seconds = 2 * parts * work.tp.gather(size) if work.parallel.sequence_parallel else parts * work.tp.all_reduce(size)
    return seconds * (1 - work.software.tensor_overlap)


def _context_exchange(
    block: BlockConfig, work: BlockWork, kernels: Kernels, attention: float, *, backward: bool = False
) -> float:
    """Predict what ring attention can't hide beside its own work, or Ulysses's all-to-alls, of one pass."""
    if work.parallel.cp == 1:
        return 0.0
    part, unit, tp = block.attention, kernels.unit, work.parallel.tp
    q_width = part.heads * part.head_dim
    kv_width = part.kv_width if isinstance(part, AttentionConfig) else q_width
    if work.parallel.cp_kind == "ulysses":
        return 4 * work.cp.exchange(work.tokens * (q_width + kv_width) / 2 / tp * unit)
    size, exchange = work.parallel.cp, work.parallel.ring_exchange
    widths = {"q_width": q_width / tp, "kv_width": kv_width / tp, "heads": part.heads / tp}
    there, back = position_bytes(exchange, **widths, unit=unit, backward=backward)
    if backward and exchange == "keys" and size > work.parallel.ring_direct and part.window is None:
        # Handed on: of keys three quarters, and N times the whole sum of their gradients in fp32 or wider.
        there, back = 0.75 * there, back * max(4, unit) / unit * size / (size - 1)
    hop = work.cp.send(work.tokens * (there + back))
    beside = attention / size
    last = work.cp.send(work.tokens * back) if back else 0.0  # no computation is left to hide the last results
    # Partial results of each hop are put together in memory.
    merging = kernels.pointwise(4 * 2 * unit * work.tokens * q_width / tp) * (size - 1) / size
    return max((size - 1) * max(0.0, hop - beside), last) + merging


def _recomputation(block: BlockConfig, work: BlockWork, kernels: Kernels, forward: Parts) -> float:
    if work.policy == "full":
        return sum(forward.values()) - _last_product(block, work, kernels, forward)
    if work.policy != "selective":
        return 0.0
    if work.software.selective == "attention":
        return forward.get("attention", 0.0)
    if work.software.selective == "products":
        return forward["products"] / 2 + forward["pointwise"]
    if isinstance(block.ffn, MixtureConfig):
        exchange = forward.get("expert exchange", 0.0)
        return forward["experts"] * _experts_again(block, block.ffn, work) + forward["pointwise"] + exchange
    product = kernels.float8_product if work.float8 else kernels.product
    again = 2 if block.norms_after else 1  # a norm reads the last one
    return again * product(work.tokens, block.ffn.ffn_dim / work.parallel.tp, block.ffn.dim) + forward["pointwise"]


def _experts_again(block: BlockConfig, part: MixtureConfig, work: BlockWork) -> float:
    """Return the part of a mixture's products that is computed again."""
    conditions = {"last_read": block.norms_after, "fused": work.fused_experts, "compiled": work.compiled}
    return recomputed_matrices(part, work.policy, **conditions) / (part.active_matrices + part.cell_matrices)


def _last_product(block: BlockConfig, work: BlockWork, kernels: Kernels, forward: Parts) -> float:
    """Predict the time of what ends a block, and is not computed again."""
    if work.software.recomputes_last:
        return 0.0
    if isinstance(block.ffn, MixtureConfig):
        return forward["experts"] * (1 - _experts_again(block, block.ffn, work))
    product = kernels.float8_product if work.float8 else kernels.product
    return 0.0 if block.norms_after else product(work.tokens, block.ffn.dim, block.ffn.ffn_dim / work.parallel.tp)
