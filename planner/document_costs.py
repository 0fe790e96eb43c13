"""Costs of documents from a cluster's measured rates, for hybrid data parallelism to deal by. Imports no torch."""

from __future__ import annotations

from collections import defaultdict

from ..models.config import DecoderConfig
from ..models.part_config import BlockConfig
from ..parallel.config import ParallelConfig
from ..parallel.hybrid.cost import CostModel
from ..parallel.layout import Layout
from .block_time import BlockWork, block_time
from .cluster import ClusterConfig
from .kernel_time import Kernels
from .memory import Job
from .software import COMPILED, EAGER
from .step_time import ends_time

LENGTHS = (1024, 65536)
"""Lengths of documents between which a block's time is linear per token: attention's rate is that of `Kernels.attention`."""


def document_costs(
    model: DecoderConfig,
    parallel: ParallelConfig,
    layout: Layout,
    job: Job,
    cluster: ClusterConfig,
    *,
    with_ends: bool = True,
) -> CostModel:
    """Predict the seconds of documents in rows of `job.tokens`, both passes over all layers, embedding and head included.

    with_ends: False leaves embedding and head out

    A block's seconds per token are a + b n for documents of n tokens, so that two lengths tell both. A row costs what its
    kernels' beginnings do. Of a layer with a window both lengths lie inside of it.
    """
    kernels = Kernels(cluster, job.precision)
    quadratic, row = 0.0, 0.0
    windows: defaultdict[int, float] = defaultdict(float)
    ends = ends_time(model, parallel.tp, kernels, job.tokens, first=True, last=True)
    seconds_of_ends = sum(sum(parts.values()) for parts in (ends.forward, ends.to_input, ends.to_weight))
    linear = seconds_of_ends / job.tokens if with_ends else 0.0
    known: dict[tuple[int, str], tuple[float, float, float]] = {}
    for block, policy in zip(model.blocks(), job.policies, strict=True):
        if (id(block), policy) not in known:
            known[id(block), policy] = _block_costs(block, policy, parallel, layout, job, kernels)
        slope, each_token, each_row = known[id(block), policy]
        linear, row = linear + each_token, row + each_row
        if block.attention.window is None:
            quadratic += slope
        else:
            windows[block.attention.window] += slope
    return CostModel(quadratic, linear, row, tuple(sorted(windows.items())))


def _block_costs(
    block: BlockConfig, policy: str, parallel: ParallelConfig, layout: Layout, job: Job, kernels: Kernels
) -> tuple[float, float, float]:
    """Return a block's seconds per token and position of its document, per token, and per row."""
    window = block.attention.window
    lengths = LENGTHS if window is None else (max(1, window // 4), window)
    software = COMPILED if job.compiled else EAGER
    seconds: list[float] = []
    launches = 0.0
    for length in lengths:
        work = BlockWork.of(job, parallel, layout, software, kernels, length=length, policy=policy)
        parts = block_time(block, work, kernels)
        passes = parts.forward, parts.to_input, parts.to_weight
        launches = sum(each.get("launches", 0.0) for each in passes)
        seconds.append((sum(sum(each.values()) for each in passes) - launches) / job.tokens)
    slope = (seconds[1] - seconds[0]) / max(1, lengths[1] - lengths[0])
    return slope, seconds[0] - slope * lengths[0], launches
