"""Predict the update of optimizers that compute whole matrices: their products, and the way of matrices to their owners.

Each matrix of a stage is computed once, by the rank that owns it, the heaviest first given to the least loaded
(`parallel/matrices.py`). Matrices travel in waves: while one is computed the next arrives. Imports no torch.
"""

from __future__ import annotations

import functools
import heapq
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..config.precision import PRECISIONS
from ..optim.optimizers.matrix_config import (
    GaLoreConfig,
    LowRankConfig,
    MatrixOptimConfig,
    MuonConfig,
    NaturalGaLoreConfig,
    SOAPConfig,
)
from ..optim.optimizers.newton_schulz_forms import groups_of_steps, products
from .kernel_time import Kernels
from .network import Group
from .parameters import Inventory

WAVE = 1 << 26
"""Elements that an owner computes together (`optim.optimizers.parameters.WAVE`, which needs torch; a test compares them)."""
FACTORING = 0.1
"""Speed of a decomposition (QR, SVD), of that of a product of as many FLOPs: a guess, which nobody has measured here."""
LOCAL = {True: 30, False: 26}
"""Bytes per element, with a gradient in fp32, that are read and written where it lies, by our own kernels: of Muon, which has
its momentum there (the gradient read for its norm and for the momentum, the momentum read and written, its lookahead written,
then update and weight read, weight and the computation's copy written), and of others, whose gradients are scaled in place."""
OWNED = 40
"""Bytes per element that an owner's pointwise operations read and write, in fp32: moments, their roots, scales, norms."""
NORMALIZING = 5
"""Elements that Newton–Schulz moves for one of a matrix, beside products: read for the norm, divided by it, copied back."""

Shape = tuple[int, int]


@dataclass(frozen=True)
class MatrixWork:
    """The whole matrices of a pipeline stage.

    config  of the optimizer
    counts  (rows, columns) → number of such matrices
    ranks   of the stage, which share them
    """

    config: MatrixOptimConfig
    counts: Mapping[Shape, int]
    ranks: int

    @classmethod
    def of(cls, config: MatrixOptimConfig, model: Inventory, layers: frozenset[int], ranks: int) -> MatrixWork:
        """List the matrices of these layers of a model."""
        counts: Counter[Shape] = Counter()
        for group in model.groups:
            if group.layer in layers:
                for each in group.parameters:
                    if each.hidden and each.row_parts and isinstance(config, MuonConfig) and config.per_head:
                        counts.update((rows, each.shape[1]) for rows in each.row_parts)
                    elif each.hidden:
                        counts[each.shape[0] // each.stacked, each.shape[1]] += each.stacked
        return cls(config, counts, ranks)

    @property
    def elements(self) -> int:
        """Elements of all of them."""
        return sum(rows * columns * count for (rows, columns), count in self.counts.items())


def matrix_parts(work: MatrixWork, kernels: Kernels, levels: Sequence[Group], forward: str, held: float) -> dict[str, float]:
    """Predict the parts of an update, of the rank that has most to compute.

    kernels: of the masters' precision; forward: the precision in which Muon computes and sends; levels: groups in which
    matrices travel one after another, from the innermost outwards, of all ranks of the stage where there is one;
    held: elements of matrices whose weights and state lie on a rank, more than its part of them where ranks hold copies
    """
    muon = isinstance(work.config, MuonConfig)
    computing = Kernels(kernels.cluster, forward) if muon else kernels
    costs = {shape: matrix_seconds(work.config, shape, computing) for shape in work.counts}
    owned = busiest(tuple((costs[shape], count, shape) for shape, count in sorted(work.counts.items())), work.ranks)
    compute = sum(costs[shape] * count for shape, count in owned.items())
    parts = {"matrix update": compute + kernels.pointwise(LOCAL[muon] * held)}
    if work.ranks > 1:
        mine = sum(rows * columns * count for (rows, columns), count in owned.items())
        unit = PRECISIONS[forward].bytes if muon else kernels.unit
        waves = max(1, -(-mine // WAVE))
        # There with gradients, back with updates. What arrives while the wave before it is computed costs no time of its own.
        # Of copies one is sent, and all come back, to a block of ranks once for all of them (`parallel/matrix_plan.py`).
        way, block = 0.0, 1
        for level in levels:
            there, back = max(work.elements / work.ranks, mine), max(min(held, work.elements / block), mine)
            way += level.exchange(unit * there, waves) + level.exchange(unit * back, waves)
            block *= level.ranks
        parts["matrix exchange"] = max(compute, way) + min(compute, way) / waves - compute
    return parts


@functools.lru_cache(maxsize=4096)
def busiest(kinds: tuple[tuple[float, int, Shape], ...], ranks: int) -> Mapping[Shape, int]:
    """Deal matrices to ranks, the heaviest first to the least loaded. Return the most loaded rank's, by shape.

    kinds: (cost of one, number of them, shape)
    """
    loads: list[tuple[float, int]] = [(0.0, rank) for rank in range(ranks)]
    held: list[Counter[Shape]] = [Counter() for _ in range(ranks)]
    for cost, count, shape in sorted(kinds, key=lambda kind: -kind[0]):
        for _ in range(count):
            load, rank = heapq.heappop(loads)
            held[rank][shape] += 1
            heapq.heappush(loads, (load + cost, rank))
    return held[max(loads)[1]]


def matrix_seconds(config: MatrixOptimConfig, shape: Shape, kernels: Kernels) -> float:
    """Predict the update of one matrix on its owner."""
    rows, columns = shape
    if isinstance(config, MuonConfig):
        # Of symmetric results both halves: whether a GPU has a kernel that computes only one is not known here.
        sizes, moved = products(rows, columns, groups_of_steps(rows, columns, config.ns_steps)), NORMALIZING * kernels.unit
    else:
        sizes, moved = _products(config, shape), OWNED
    return sum(kernels.product(*size) * times for size, times in sizes) + kernels.pointwise(moved * rows * columns)


def _products(config: MatrixOptimConfig, shape: Shape) -> Iterator[tuple[tuple[int, int, int], float]]:
    """Yield (rows, output width, input width) of products, and how many of them a step takes."""
    rows, columns = shape
    short, long = sorted(shape)
    if isinstance(config, SOAPConfig):
        for side, other in ((rows, columns), (columns, rows)):
            if side <= config.max_dim:
                yield (side, side, other), 1.0  # G·Gᵀ
                yield (side, other, side), 3.0  # into the basis twice, and back
                yield (side, side, side), (1.0 + 4 / 3 / FACTORING) / config.interval  # a turn: a product, and QR
    elif isinstance(config, LowRankConfig):
        rank = min(config.rank, short)
        yield (rank, long, short), 1.0
        if isinstance(config, NaturalGaLoreConfig):
            yield (config.history, config.history, rank * long), 1.0
            yield (config.history, 2, rank * long), 1.0
        if isinstance(config, GaLoreConfig):
            yield (short, long, rank), 1.0
            yield (short, long, short), 10 / FACTORING / config.interval  # singular vectors: 20 short² long FLOPs
