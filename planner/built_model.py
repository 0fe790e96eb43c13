"""Read what a plan counts off a built model and optimizer: for classes of a user's own, which only PyTorch knows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.distributed.tensor import Shard

from ..models.protocol import Model, decoder_shape
from ..optim.optimizers.parameters import FusedStep, NamedParameter, RoundedStep, Unsharded
from ..parallel.engine import OptimizerFactory
from ..parallel.tensor.placements import weight_owners
from .memory import OptimizerBytes, OptimizerNeeds, WeightGroup
from .parameters import Inventory, ParameterShape


def model_inventory(model: Model, tp: int) -> Inventory:
    """List a model's parameters, as they are cut over `tp` ranks. model: on the meta device."""
    placed = weight_owners(model)
    found: list[ParameterShape] = []
    for name, parameter in model.named_parameters():
        owner = placed.get(name.rpartition(".")[0])
        placement = None if owner is None else owner.placement(parameter, tp)
        cut = placement.dim if isinstance(placement, Shard) else None
        settings = model.decays(name), model.lr_scale(name), model.stacked(name), model.row_parts(name)
        found.append(ParameterShape(name, tuple(parameter.shape), cut, None, *settings))
    return Inventory(decoder_shape(model), tuple(found))


def tried_optimizer(make: OptimizerFactory) -> OptimizerBytes:
    """Return a count of what an optimizer keeps, by a step on tensors without storage.

    Its state is not known if it can't take one. What it holds in an update alone is not counted.
    """

    def count(groups: Sequence[WeightGroup], unit: int) -> OptimizerNeeds:
        shards = [each for group in groups for each in group.named()]
        dtype = torch.float64 if unit == 8 else torch.float32
        try:
            with torch.device("meta"):
                tensors = [nn.Parameter(torch.empty(each.shape, dtype=dtype)) for _, each in shards]
            parameters = [
                NamedParameter(name, tensor, each.shape, each.of.decays, each.of.lr_scale, hidden=each.of.hidden)
                for (name, each), tensor in zip(shards, tensors, strict=True)
            ]
            for parameter in parameters:
                parameter.tensor.grad = torch.empty_like(parameter.tensor)
            # Not under the meta device: counters, which an optimizer makes without naming a device, are numbers that it reads.
            optimizer = make(parameters, Unsharded())
            optimizer.step()
        except (RuntimeError, NotImplementedError):  # an optimizer whose step asks for numbers
            return OptimizerNeeds(None)
        values = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
        size = sum(value.numel() * value.element_size() for value in values if value.dim())
        moments = size / max(1, sum(each.padded for _, each in shards))
        return OptimizerNeeds(size, isinstance(optimizer, FusedStep), isinstance(optimizer, RoundedStep), moments=moments)

    return count
