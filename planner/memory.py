"""Compute what a layout holds, by arithmetic: parts of parameters, and the optimizer's state for them. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ..config.precision import PRECISIONS
from ..models.costs import ForwardPass
from ..optim.optimizers.config import AdamWConfig, OptimConfig
from ..optim.optimizers.eight_bit_config import LARGEST_BLOCK, AdamW8bitConfig
from ..optim.optimizers.matrix_config import MatrixOptimConfig, MuonConfig
from ..optim.optimizers.state_size import state_size
from ..optim.optimizers.update_passes import FUSED_ADAMW, update_passes
from ..parallel.config import ParallelConfig
from ..parallel.layout import Layout
from .parameters import ParameterGroup, ParameterShape


@dataclass(frozen=True)
class Job:
    """The work to be planned, besides the model and the layout.

    seq_len, micro    positions per sample, samples per micro-batch
    micro_batches     per rank and step
    precision         bf16, fp32 or fp64
    policies          of each block: none, selective, full or offload; compiled: whether blocks are compiled
    fused             whether SwiGLU is computed inside the products around it (`kernels/swiglu.py`)
    fused_experts     whether `kernels/experts/` compute the experts; None: not known, what keeps more is counted
    float8            none, tensorwise or rowwise: of the blocks' products
    masters           full, bf16_stochastic or bf16_kahan: how masters of bf16 weights are kept
    row               tokens of a micro-batch under hybrid data parallelism, which deals documents; None: it deals samples
    per_host          ranks of a host, which are filled in order; None: all are on one
    """

    seq_len: int
    micro: int
    micro_batches: int
    precision: str
    policies: list[str]
    compiled: bool
    fused: bool = False
    fused_experts: bool | None = None
    float8: str = "none"
    masters: str = "full"
    row: int | None = None
    per_host: int | None = None

    @property
    def tokens(self) -> int:
        """Positions of a micro-batch, before context parallelism cuts them."""
        return self.micro * self.seq_len if self.row is None else self.row

    def narrow_gradients(self, ranks: int) -> bool:
        """Return whether gradients of whole weights, added up over so many ranks, can stay in the computation's dtype."""
        exact = PRECISIONS[self.precision]
        return ranks == 1 and self.micro_batches == 1 and exact.bytes < exact.accum_bytes

    def forward_pass(self, parallel: ParallelConfig) -> ForwardPass:
        """Describe a rank's forward pass of one micro-batch."""
        return ForwardPass(
            tokens=self.tokens // parallel.cp,
            precision=self.precision,
            tp=parallel.tp,
            sequence_parallel=parallel.sequence_parallel,
            compiled=self.compiled,
            fused_swiglu=self.fused,
            fused_experts=self.fused_experts,
        )


@dataclass(frozen=True)
class WeightShard:
    """One parameter of a stage, for the rank with the largest shard.

    of      the parameter
    whole   elements after tensor parallelism, as the computation uses them
    shape   of the shard itself, for which storage is kept
    """

    of: ParameterShape
    whole: int
    shape: tuple[int, ...]

    @property
    def padded(self) -> int:
        """Elements of the shard."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class WeightGroup:
    """A rank's part of parameters that are gathered together. whole, padded: elements, as `WeightShard`'s of one.

    Groups of one kind share their shards, which have the names of the first of them: see `named`.
    ranks    that share the weights after expert parallelism has dealt them out
    experts  whether they are experts that it deals out: those of a block are a group apart
    stage_ranks  of their pipeline stage, among whom matrices are shared out that an optimizer updates as wholes
    """

    name: str
    shards: tuple[WeightShard, ...]
    whole: int
    padded: int
    ranks: int = 1
    experts: bool = False
    stage_ranks: int = 1

    def named(self) -> Iterator[tuple[str, WeightShard]]:
        """Yield each shard with the name of its parameter."""
        for shard in self.shards:
            yield self.name + shard.of.name.removeprefix(shard.of.group), shard


class Cutter:
    """Cuts parameters over the ranks of a layout, as FSDP2 over tensor-parallel parameters does: along dim 0, into equal chunks
    except the last.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._known: dict[int, list[WeightGroup]] = {}

    def cut(self, groups: Iterable[ParameterGroup]) -> list[WeightGroup]:
        """Return the shards of each group; under expert parallelism those of its experts apart."""
        return [replace(part, name=each.name) for each in groups for part in self._cut(each)]

    def _cut(self, group: ParameterGroup) -> list[WeightGroup]:
        if group.kind not in self._known:
            parts: dict[bool, list[ParameterShape]] = {}
            for each in group.parameters:
                parts.setdefault(self._layout.ep > 1 and each.of_experts, []).append(each)
            self._known[group.kind] = [self._part(group.name, members, experts) for experts, members in parts.items()]
        return self._known[group.kind]

    def _part(self, name: str, parameters: Sequence[ParameterShape], experts: bool) -> WeightGroup:
        layout, shards = self._layout, list[WeightShard]()
        dealt, ranks = (layout.ep, layout.expert_weights) if experts else (1, layout.weight_ranks)
        for each in parameters:
            first, *others = each.local_shape(layout.tp)
            first //= dealt
            shards.append(WeightShard(each, math.prod((first, *others)), (-(-first // ranks), *others)))
        whole, padded = sum(each.whole for each in shards), sum(each.padded for each in shards)
        return WeightGroup(name, tuple(shards), whole, padded, ranks, experts, layout.stage_ranks)


@dataclass(frozen=True)
class OptimizerNeeds:
    """Needs of an optimizer in a rank's memory, on a GPU with Triton.

    state    bytes; None where that is not known before it runs
    fused    whether it takes gradients in the dtype of the computation (`optim.optimizers.parameters.FusedStep`)
    rounded  whether bf16 weights need no masters in its update (`RoundedStep`)
    updates  which updates of whole matrices it holds at once: those that travel in the dtype of the computation, with what they
             are made of (`computed`: Muon), or those in the masters' dtype, with gradients that are widened to it (`widened`)
    moments  bytes of state for an element that is updated by itself
    passes   arrays of the weights' shape that are read and written where no kernel of ours does it (`update_passes`)
    """

    state: int | None
    fused: bool = False
    rounded: bool = False
    updates: Literal["none", "computed", "widened"] = "none"
    moments: float = 8.0
    passes: float = FUSED_ADAMW


OptimizerBytes = Callable[[Sequence[WeightGroup], int], OptimizerNeeds]
"""(weights, bytes of an element) → what the optimizer takes for them."""


def optimizer_bytes(config: OptimConfig) -> OptimizerBytes | None:
    """Return the count of what an optimizer of Meshloom's keeps; None for a class of the user's own.

    State of whole matrices is counted as if it lay evenly on the ranks of a stage.
    """
    if state_size(config, (1, 1), 1, hidden=False) is None:
        return None
    rounded = (isinstance(config, AdamWConfig) and config.fused is not False) or (
        isinstance(config, AdamW8bitConfig) and config.block <= LARGEST_BLOCK
    )
    fused = rounded or isinstance(config, MatrixOptimConfig)
    updates = "computed" if isinstance(config, MuonConfig) else "widened" if isinstance(config, MatrixOptimConfig) else "none"

    def count(groups: Sequence[WeightGroup], unit: int) -> OptimizerNeeds:
        known: dict[int, int] = {}  # of groups of one kind, which share their shards
        for group in groups:
            if id(group.shards) not in known:
                known[id(group.shards)] = sum(_state_bytes(config, each, unit, group.stage_ranks) for each in group.shards)
        state, elements = sum(known[id(group.shards)] for group in groups), sum(group.padded for group in groups)
        # Islands' weights of the last exchange, and their outer momentum, stay where they are in such an update.
        each = state / max(1, elements) - config.local.arrays * unit
        moments = 2.0 * unit if updates != "none" else each
        return OptimizerNeeds(state, fused, rounded, updates, moments, update_passes(config))

    return count


def _state_bytes(config: OptimConfig, shard: WeightShard, unit: int, stage_ranks: int) -> int:
    size = state_size(config, shard.of.shape, unit, hidden=shard.of.hidden, stacked=shard.of.stacked)
    assert size is not None
    element = size.element + config.local.arrays * unit
    return round(element * shard.padded + size.owned / stage_ranks)
