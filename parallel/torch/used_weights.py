"""Agreement of ranks on the weights that they use in a step, for models that may skip weights (`models/protocol.py`).

Gradients are sent while others are still computed, each unit of weights as soon as its own are complete. Ranks pair the same
units only if all complete them in one order. Which weights a backward pass will reach, and when, is read off the autograd
graph before it starts. If ranks differ in it, none sends anything before the pass has ended. Then each sends zeros for weights
that only others have used, unit by unit in one order.

No rank waits for another inside of a backward pass for this, where collectives of layers have their own order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import nn

from ..mesh import WeightAxes
from ..weight_use import completion, extremes, highest
from .exchange import ExchangeUnit

UNUSED, AT_END, FIRST = 0, 1, 2
"""Times to send a weight's gradient: never, after the pass, or in it, with the unit that is complete first (+ 1: second)."""


class UsedWeights:
    """Compares the ranks that hold the same weights, before a backward pass and, where they differ, after it."""

    def __init__(
        self,
        units: Mapping[ExchangeUnit, Sequence[nn.Parameter]],
        axes: WeightAxes,
        waiting: Callable[[], AbstractContextManager[None]],
    ) -> None:
        """units: their weights; waiting: encloses what waits for other ranks."""
        self._units, self._waiting = units, waiting
        self._groups = [axis.get_group() for axis in (axes.shards, axes.copies) if axis.size() > 1]
        self._weights = {weight for weights in units.values() for weight in weights}
        self._differ = False

    def differ(self, loss: torch.Tensor) -> bool:
        """Return whether ranks will use other weights in the backward pass of a loss, or in another order. A collective."""
        completed, hides = completion(loss, self._weights)
        mine = [*self._sent(completed), hides]
        most, least = extremes(mine, self._groups, self._waiting)
        self._differ = most != least or most[-1] > 0
        return self._differ

    def _sent(self, completed: Mapping[nn.Parameter, int]) -> list[int]:
        """Return when each weight's gradient is sent. completed: as of `completion`."""
        ends = {
            unit: min(completed[weight] for weight in weights)
            for unit, weights in self._units.items()
            if all(weight in completed for weight in weights)
        }
        order = {unit: FIRST + at for at, unit in enumerate(sorted(ends, key=ends.__getitem__, reverse=True))}
        return [
            order.get(unit, AT_END) if weight in completed or before is not None else UNUSED
            for unit, weights in self._units.items()
            for weight, before in zip(weights, unit.taken, strict=True)
        ]

    def fill(self, keep_dtype: bool) -> None:
        """Take zeros as the gradients of weights that only other ranks have used, if ranks differ. A collective then.

        keep_dtype: as of `ExchangeUnit.take`
        """
        if not self._differ:
            return
        self._differ = False
        weights = [(unit, index) for unit in self._units for index in range(len(unit.weights))]
        used = highest([unit.taken[index] is not None for unit, index in weights], self._groups, self._waiting)
        for (unit, index), somewhere in zip(weights, used, strict=True):
            if somewhere and unit.taken[index] is None:
                unit.take_zeros(index, keep_dtype)
