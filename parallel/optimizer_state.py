"""Optimizer state in a checkpoint: the weights, the state of each element, and the arrays that the optimizer declares."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from ..optim.optimizers.own_arrays import declared
from ..optim.optimizers.parameters import AveragesWeights, NamedParameter
from .box import Box
from .fragment import Fragment


def optimizer_fragments(optimizer: torch.optim.Optimizer, parameters: Sequence[NamedParameter]) -> Iterator[Fragment]:
    """Yield this rank's boxes of the weights and of the optimizer's arrays, live.

    Raises ValueError for an array in `optimizer.state` that has another shape than the shard and is not declared.
    """
    own = declared(optimizer)
    average = optimizer.average_role if isinstance(optimizer, AveragesWeights) else None
    apart = {(array.name, array.role) for array in own}
    for parameter in parameters:
        box = Box(parameter.offsets, tuple(parameter.tensor.shape))
        arrays = {"weight": parameter.tensor.detach() if parameter.stored is None else parameter.stored}
        for role, value in optimizer.state[parameter.tensor].items():
            if not torch.is_tensor(value) or not value.dim() or (parameter.name, role) in apart:
                continue
            if role == average:  # what is saved as the weight; the weights that are trained at follow from it
                role = "weight"
            if value.shape != parameter.tensor.shape:
                raise ValueError(
                    f"{type(optimizer).__name__} keeps '{role}' of shape {list(value.shape)} for {parameter.name}, which has "
                    f"shape {list(parameter.tensor.shape)} here: list it in `own_arrays` (optim/optimizers/own_arrays.py)"
                )
            arrays[role] = value
        if box.numel:
            for role, tensor in arrays.items():
                yield Fragment(parameter.name, role, parameter.global_shape, box, tensor)
    for array in own:
        if array.tensor.numel():
            box = Box(array.offsets, tuple(array.tensor.shape))
            yield Fragment(array.name, array.role, array.global_shape, box, array.tensor, array.splits)
