"""The weights that the loss of a rank depends on, and a check that ranks do not differ in them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn

from ..config.problems import ConfigError, Problem

ACCUMULATE = "torch::autograd::AccumulateGrad"
"""The node behind a leaf of the graph, which adds to its gradient."""

HIDING = "CheckpointFunctionBackward"
"""The node of a checkpoint with `use_reentrant=True`: its weights are in a graph of its own, made in the backward pass."""


def completion(loss: torch.Tensor, weights: Collection[nn.Parameter]) -> tuple[dict[nn.Parameter, int], bool]:
    """Find the weights in the graph of a loss, and when its backward pass completes their gradients.

    Autograd always runs the newest node that is ready, so a gradient is complete with the oldest node that uses the weight. The
    numbers of these nodes are returned, in the order of the forward pass. Also returns whether the graph hides weights.
    """
    completed: dict[nn.Parameter, int] = {}
    hides = False
    left = [] if loss.grad_fn is None else [loss.grad_fn]
    seen = set(left)
    while left:
        node = left.pop()
        hides = hides or node.name() == HIDING
        for after, _ in node.next_functions:
            if after is None or after in seen:
                continue
            if after.name() == ACCUMULATE:
                weight = cast(Any, after).variable
                if weight in weights:
                    # Private: nothing public says in which order nodes run. `test_used_weights.py` compares it with a pass.
                    number = node._sequence_nr()
                    completed[weight] = min(number, completed.get(weight, number))
            else:
                seen.add(after)
                left.append(after)
    return completed, hides


def highest(
    numbers: Sequence[int], groups: Sequence[dist.ProcessGroup], waiting: Callable[[], AbstractContextManager[None]]
) -> list[int]:
    """Return the highest of the ranks' numbers at each place. A collective of the hosts: it waits for no device.

    groups: over which the ranks are reached one after another; waiting: encloses what waits for other ranks
    """
    votes = torch.tensor(numbers, dtype=torch.int64)
    with waiting():
        for group in groups:
            dist.all_reduce(votes, dist.ReduceOp.MAX, group=group)
    return votes.tolist()


def extremes(
    numbers: Sequence[int], groups: Sequence[dist.ProcessGroup], waiting: Callable[[], AbstractContextManager[None]]
) -> tuple[list[int], list[int]]:
    """Return the highest and the lowest of the ranks' numbers at each place, by one `highest`."""
    both = highest([*numbers, *(-number for number in numbers)], groups, waiting)
    return both[: len(numbers)], [-number for number in both[len(numbers) :]]


class SameWeights:
    """Refuses micro-batches in which ranks use different weights, where gradients of different weights would be added up."""

    def __init__(
        self,
        units: Sequence[Sequence[str]],
        groups: Sequence[dist.ProcessGroup],
        waiting: Callable[[], AbstractContextManager[None]],
    ) -> None:
        """units: names of the weights whose gradients are sent together; groups, waiting: as of `highest`."""
        self._units = {name: number for number, names in enumerate(units) for name in names}
        self._groups, self._waiting = groups, waiting
        self._names: dict[nn.Parameter, str] = {}

    def see(self, name: str, weight: nn.Parameter) -> None:
        """Learn which parameter has a name, before it is used."""
        self._names[weight] = name

    def check(self, loss: torch.Tensor) -> None:
        """Compare what ranks will use in the backward pass of a loss, and in which order of units. A collective.

        Raises ConfigError on all of them where they differ.
        """
        completed = {self._names[weight]: number for weight, number in completion(loss, self._names)[0].items()}
        ends: dict[int, int] = {}
        for name, number in completed.items():
            ends[self._units[name]] = min(number, ends.get(self._units[name], number))
        order = {unit: at for at, unit in enumerate(sorted(ends, key=ends.__getitem__, reverse=True), start=1)}
        mine = [order[unit] if name in completed else 0 for name, unit in self._units.items()]
        seen = zip(self._units, *extremes(mine, self._groups, self._waiting), strict=True)
        differing = {name: least for name, most, least in seen if most != least}
        if differing:
            some = [name for name, least in differing.items() if not least]
            text = f"{some[0]} is used on some ranks only" if some else f"ranks use {next(iter(differing))} in another order"
            fix = "use parallel.zero=0 or 1 of the torch engine, or let all ranks use the same weights in a micro-batch"
            raise ConfigError([Problem("model", f"{text}, and their gradients can't be told from those of others", fix)])
