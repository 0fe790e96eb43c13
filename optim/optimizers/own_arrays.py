"""Optimizer state whose shape, or cut over ranks, is not the weight's, such as factored moments, blocks and low-rank moments.

Elementwise arrays in `optimizer.state` need no declaration: engines see that they have the shard's shape. Any other array
must be declared here, because only the optimizer knows the whole array and which part of it this rank holds. Declared
arrays are saved, and restored under any layout, like the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from .parameters import NamedParameter

RUN = "run"
"""Role of arrays that belong to no parameter but to the whole run. Every rank lists such an array."""


@dataclass(frozen=True)
class OwnArray:
    """This rank's part of one array.

    name          of the parameter that it belongs to; of the array itself where the role is `RUN`
    role          what it is to the parameter ("exp_avg_sq_row"): as its key in `optimizer.state`, if it is there
    tensor        the part. Restoring writes into it in place
    global_shape  of the whole array
    offsets       where the part begins in it
    splits        logical split points along dim 0 of the whole (stacked experts), as `Fragment.splits`

    Ranks may hold the same part, overlapping ones, or none: a matrix that one rank owns is listed by that rank alone. Together
    they must hold every element, and what two ranks hold of one element must be equal. A part that is a whole number of
    blocks is declared in blocks: (first block, 0) is where it begins in an array of shape (blocks, elements of a block).
    """

    name: str
    role: str
    tensor: torch.Tensor
    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    splits: tuple[int, ...] = ()

    @classmethod
    def along(cls, parameter: NamedParameter, role: str, tensor: torch.Tensor, dims: Sequence[int]) -> OwnArray:
        """Declare an array with some of the parameter's dims, cut as they are: a row moment (R,) of (R, C) has dims [0]."""
        shape, offsets = parameter.global_shape, parameter.offsets
        return cls(parameter.name, role, tensor, tuple(shape[dim] for dim in dims), tuple(offsets[dim] for dim in dims))


@runtime_checkable
class HoldsOwnArrays(Protocol):
    """An optimizer that has such arrays."""

    def own_arrays(self) -> Iterable[OwnArray]:
        """Return this rank's parts of all such arrays, the same list after every update. Called after a first `step()`."""
        ...


def declared(optimizer: torch.optim.Optimizer) -> list[OwnArray]:
    """List the arrays that an optimizer declares, if any."""
    return list(optimizer.own_arrays()) if isinstance(optimizer, HoldsOwnArrays) else []
