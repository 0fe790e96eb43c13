"""Access to a DeepSpeed engine's fp32 masters, optimizer state and gradients by parameter name (rule R6): what stages share.

DeepSpeed's optimizers hold *groups*: flat fp32 tensors, each with its share of several parameters laid end to end.

    stage  a group is                                          this rank's share of a parameter of n elements
    0      one parameter                                       all of it; every rank holds the same
    1, 2   a parameter group, cut into W equal slices           what of it falls into the rank's slice
    3      (part of) a parameter group, each parameter cut      elements [r·c, r·c + c) with c = ⌈n / W⌉, the tail padded
           into W shards

A share is a flat range of the parameter, so it is a few boxes (`fragment.boxes_of_flat_range`). DeepSpeed's own functions
by name do not suffice: some hang with two parameter groups, some refuse sizes that W doesn't divide, and none updates the
low-precision weights. This follows DeepSpeed 0.19.8, the version that the extra pins. The test of write-back across stages
guards an upgrade.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ...optim.optimizers.parameters import initial_counter_values
from ..fragment import Fragment, boxes_of_flat_range

foreach: Any = torch  # the _foreach functions have no types


@dataclass(frozen=True)
class FlatShare:
    """Elements `[start, start + length)` of a parameter, at `offset` of the flat group numbered `group`."""

    name: str
    shape: tuple[int, ...]
    start: int
    length: int
    group: int
    offset: int


class EngineState(ABC):
    """Access by name to a DeepSpeed engine's state on this rank. One subclass per way of partitioning."""

    replicated = False  # whether every rank holds the same elements

    def __init__(self, engine: Any, base: torch.optim.Optimizer) -> None:
        self._engine = engine
        self.base = base  # the optimizer that updates the flat groups
        self._names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
        self.shares = [share for share in self._find_shares() if share.length > 0]

    @abstractmethod
    def masters(self) -> list[torch.Tensor]:
        """Return the flat fp32 groups. One on NVMe is an empty tensor until it is swapped in."""

    @abstractmethod
    def gradients(self) -> list[torch.Tensor]:
        """Return the reduced gradient after the last micro-batch, in pieces that together cover this rank's shares."""

    @abstractmethod
    def sync_from_masters(self) -> None:
        """Update the compute weights from the masters. Collective."""

    @abstractmethod
    def discard_gradients(self) -> None:
        """Discard the gradient without an update."""

    @abstractmethod
    def _find_shares(self) -> Iterator[FlatShare]:
        """Yield this rank's share of every parameter; some may be empty."""

    def gradient_squares(self) -> torch.Tensor:
        """Sum the squares of this rank's gradient, in fp64."""
        norms = foreach._foreach_norm(self.gradients())
        return torch.stack(norms).double().square().sum()

    def clip_gradients(self, max_norm: float, norm: torch.Tensor) -> None:
        """Scale by min(1, max_norm / (norm + 1e-6))."""
        gradients = self.gradients()
        foreach._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0).to(gradients[0]))

    def arrays(self, group: int) -> dict[str, torch.Tensor]:
        """Return role → flat tensor of a group: the master, and the optimizer's state that has its shape."""
        master = self.masters()[group]
        arrays = {"weight": master.detach()}
        for role, value in self.base.state.get(master, {}).items():
            if torch.is_tensor(value) and value.dim() and value.shape == master.shape:
                arrays[role] = value.detach()
        return arrays

    def fragments(self) -> Iterator[Fragment]:
        """Yield live boxes of every share."""
        for group, shares in itertools.groupby(sorted(self.shares, key=lambda share: share.group), lambda share: share.group):
            arrays = self.arrays(group)
            for share in shares:
                yield from _boxes(share, arrays)

    def counters(self) -> dict[str, float]:
        """Return the optimizer's scalars by name, the same for every group; {} before its first update."""
        state = self.base.state.get(self.masters()[0], {})
        return {role: float(value) for role, value in state.items() if not torch.is_tensor(value) or not value.dim()}

    def load_counters(self, counters: dict[str, float]) -> None:
        """Set the scalars of every group."""
        for master in self.masters():
            state = self.base.state[master]
            for role, value in counters.items():
                if torch.is_tensor(state[role]):
                    state[role].fill_(value)
                else:
                    state[role] = type(state[role])(value)

    def create_optimizer_state(self) -> None:
        """Make the optimizer create its state, by an update with a zero gradient at rate zero: no weight changes."""
        groups = self.base.param_groups
        rates = [group["lr"] for group in groups]
        members = [group["params"] for group in groups]
        for group in groups:
            group["lr"] = 0.0
        for index, master in enumerate(self.masters()):
            self._with_group(index, master, self._step_on_zero)
        for group, rate, member in zip(groups, rates, members, strict=True):
            group["lr"], group["params"] = rate, member
        self.load_counters(initial_counter_values(self.base, self.counters()))

    def _with_group(self, index: int, master: torch.Tensor, act: Any) -> None:
        act(index, master)

    def _step_on_zero(self, index: int, master: torch.Tensor) -> None:
        kept = master.grad
        master.grad = torch.zeros_like(master)
        for number, group in enumerate(self.base.param_groups):
            group["params"] = [master] if number == self._group_number(index) else []
        self.base.step()
        master.grad = kept

    def _group_number(self, index: int) -> int:
        """Return the index of the optimizer's parameter group that a flat group belongs to."""
        return index

    def updated(self) -> None:  # noqa: B027 - most have nothing to reset
        """Reset what was set for one step alone. Called after DeepSpeed's step."""


def whole_shape(parameter: torch.nn.Parameter) -> tuple[int, ...]:
    """Return the shape of the whole parameter, which stage 3 keeps beside an emptied tensor."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _boxes(share: FlatShare, arrays: dict[str, torch.Tensor]) -> Iterator[Fragment]:
    boxes = boxes_of_flat_range(share.shape, share.start, share.length)
    for role, flat in arrays.items():
        for box, at in boxes:
            tensor = flat.view(-1).narrow(0, share.offset + at, box.numel).view(box.shape)
            yield Fragment(share.name, role, share.shape, box, tensor)
