"""All weights of a rank's stages: the union of their groups, each with its strategy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import nn

from ...kernels.rounding import KeptWeight
from ...models.protocol import Model, hidden_matrices
from ...optim.optimizers.parameters import NamedParameter
from ..config import ParallelConfig
from ..engine import EngineSettings
from ..fragment import Fragment
from ..mesh import Mesh
from ..shards import MeshShards, Placed
from .fully_sharded import FullyShardedWeights
from .groups import ParameterGroup
from .masters import MasterWeights
from .strategy import LocalWeight, WeightStrategy
from .transport import choose_transport, make_exchange_groups


def make_strategies(
    groups: Sequence[ParameterGroup], mesh: Mesh, parallel: ParallelConfig, settings: EngineSettings, *, may_skip: bool
) -> list[WeightStrategy]:
    """Make a strategy for each group. Every process must call it. may_skip: whether ranks may use different weights."""

    def make(group: ParameterGroup) -> WeightStrategy:
        axes = mesh.weight_axes[group.name]
        transport = choose_transport(mesh, axes, parallel)
        if group.fully_sharded:
            assert settings.masters == "full", "FSDP2's masters are its weights (`limits.masters_problems`)"
            return FullyShardedWeights(group, groups, mesh, transport, parallel, compute=settings.compute, may_skip=may_skip)
        exchange_groups = make_exchange_groups(transport, mesh, group.name, parallel.gradient_exchange)
        return MasterWeights(
            group,
            groups,
            mesh,
            transport,
            exchange_groups,
            compute=settings.compute,
            accum_dtype=settings.storage,
            may_skip=may_skip,
            masters=settings.masters,
            seed=settings.seed,
        )

    return [make(group) for group in groups]


class Weights(WeightStrategy):
    """All groups behind one interface: each method calls every strategy. `local` is in the order of the stages' parameters.

    shards  the optimizers' access to the other ranks' shards
    """

    def __init__(self, strategies: Sequence[WeightStrategy], mesh: Mesh, compute: torch.dtype, exchange: str) -> None:
        """compute: dtype of the forward pass; exchange: `parallel.gradient_exchange`."""
        super().__init__()
        self.strategies, self._mesh, self._compute, self._exchange = strategies, mesh, compute, exchange

    def shard(self, stage: Model) -> None:
        """Shard every group's weights in a stage."""
        for strategy in self.strategies:
            strategy.shard(stage)

    def adopt(self, stages: Sequence[Model], named: Mapping[str, nn.Parameter]) -> None:
        """Register every group's parameters, and list them together."""
        for strategy in self.strategies:
            strategy.adopt(stages, named)
        held = {name: weight for strategy in self.strategies for name, weight in strategy.local.items()}
        self.local = {name: held[name] for name in named}
        self.shards = MeshShards(self._mesh, self.placed, self._exchange)
        copies = torch.tensor([weight.placed.copies for weight in self.local.values()], dtype=torch.float64)
        self._per_copy = (1 / copies).to(next(iter(self.local.values())).tensor.device)

    @property
    def placed(self) -> dict[str, Placed]:
        """By name, the box of each weight that this rank updates."""
        return {name: weight.placed for name, weight in self.local.items()}

    def named_parameters(self, model: Model) -> list[NamedParameter]:
        """List the parameters for an optimizer, as plain local tensors: any elementwise optimizer is correct on them."""
        hidden = hidden_matrices(model)

        def seen(name: str, weight: LocalWeight) -> NamedParameter:
            place, copy = weight.placed, None if weight.rounded else weight.compute_copy
            return NamedParameter(
                name,
                weight.tensor,
                place.global_shape,
                decay=model.decays(name),
                lr_scale=model.lr_scale(name),
                compute_copy=copy,
                offsets=place.box.offsets,
                stacked=model.stacked(name),
                hidden=name in hidden,
                compute=self._compute,
                row_parts=model.row_parts(name),
                stored=weight.compute_copy if weight.rounded else None,
            )

        return [seen(name, weight) for name, weight in self.local.items()]

    def gradients(self) -> list[torch.Tensor]:
        """List this rank's shards of the gradients, leaving out weights that have none."""
        return [weight.tensor.grad for weight in self.local.values() if weight.tensor.grad is not None]

    def norm_square(self) -> torch.Tensor:
        """Compute this rank's part of the squared norm, divided by the copies of each element so that ranks' parts add up."""
        tensors = [weight.tensor for weight in self.local.values()]
        norms = torch.stack(torch._foreach_norm(self.gradients(), 2, tensors[0].dtype)).double()
        present = [index for index, tensor in enumerate(tensors) if tensor.grad is not None]
        # Usually all have one. Then no index is copied to the device, for which the host would wait.
        per_copy = self._per_copy if len(present) == len(tensors) else self._per_copy[present]
        return (norms.square() * per_copy).sum().to(self._mesh.device)

    def watch(self, see: Callable[[str, nn.Parameter], None]) -> None:
        """Watch every group's weights."""
        for strategy in self.strategies:
            strategy.watch(see)

    def begin_step(self, *, single: bool, fused: bool) -> None:
        """Begin the step of every group."""
        for strategy in self.strategies:
            strategy.begin_step(single=single, fused=fused)

    def set_last_micro_batch(self, last: bool) -> None:
        """Tell every group."""
        for strategy in self.strategies:
            strategy.set_last_micro_batch(last)

    def begin_backward(self, loss: torch.Tensor) -> None:
        """Prepare every group."""
        for strategy in self.strategies:
            strategy.begin_backward(loss)

    def wait_reduce(self) -> None:
        """Wait for every group's gradients."""
        for strategy in self.strategies:
            strategy.wait_reduce()

    def wait_all_gather(self, *, compute_copies: bool) -> None:
        """Wait for every group's gathers."""
        for strategy in self.strategies:
            strategy.wait_all_gather(compute_copies=compute_copies)

    def begin_update(self, *, rounded: bool) -> Mapping[torch.Tensor, KeptWeight]:
        """Begin every group's update, and return what is updated in the place of all their weights."""
        begun = [strategy.begin_update(rounded=rounded) for strategy in self.strategies]
        return {weight: kept for each in begun for weight, kept in each.items()}

    def fragments(self) -> Iterator[Fragment]:
        """Yield what checkpoints store of every group besides its weights."""
        for strategy in self.strategies:
            yield from strategy.fragments()

    def counters(self) -> dict[str, float]:
        """Return every group's numbers, which are the same."""
        return {name: value for strategy in self.strategies for name, value in strategy.counters().items()}

    def load_counters(self, counters: Mapping[str, float]) -> None:
        """Set every group's."""
        for strategy in self.strategies:
            strategy.load_counters(counters)

    def all_gather_weights(self, *, copied: bool) -> None:
        """Begin every group's gathers."""
        for strategy in self.strategies:
            strategy.all_gather_weights(copied=copied)

    def sync_from_masters(self) -> None:
        """Bring every group's weights up to date."""
        for strategy in self.strategies:
            strategy.sync_from_masters()

    def reshard(self) -> None:
        """Free what every group has gathered."""
        for strategy in self.strategies:
            strategy.reshard()

    def masters_written(self) -> None:
        """Tell every group."""
        for strategy in self.strategies:
            strategy.masters_written()
