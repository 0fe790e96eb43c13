"""The base of optimizers that update an element by its own past alone, with operations on lists of shards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch

from .config import OptimConfig, base_rate
from .parameters import NamedParameter, decay_groups

Tensors = list[torch.Tensor]


class ElementwiseOptimizer(torch.optim.Optimizer):
    """Keeps arrays of the weights' shape, zeros at first, and counts updates. There is no communication.

    roles    names of the arrays in `optimizer.state`
    counted  whether the number of updates is kept, and saved
    masks    whether `update` obeys `taken`: see `MaskedStep`
    """

    roles: ClassVar[tuple[str, ...]] = ()
    counted: ClassVar[bool] = True
    masks: ClassVar[bool] = False
    skip: torch.Tensor | None = None

    def __init__(self, config: OptimConfig, parameters: Sequence[NamedParameter]) -> None:
        super().__init__(decay_groups(parameters, config.weight_decay), {"lr": base_rate(config)})
        self.updates_taken = 0
        """With the one under way."""

    @property
    def masked_step(self) -> bool:
        """See `MaskedStep`."""
        return self.masks

    def forget_steps(self, count: int) -> None:
        """See `MaskedStep`."""
        for state in self.state.values() if self.counted else ():
            state["step"] -= count

    def update(self, group: dict[str, Any], weights: Tensors, gradients: Tensors, arrays: Sequence[Tensors]) -> None:
        """Update the weights of a parameter group in place, and their arrays, which are in the order of `roles`.

        gradients: zeros where the step is not `taken`
        """
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take one update."""
        assert closure is None
        held = [weight for group in self.param_groups for weight in group["params"]]
        self.updates_taken = int(self.state[held[0]].get("step", 0)) + 1
        for weight in held:
            state = self.state[weight]
            if self.counted:
                state["step"] = self.updates_taken  # of all: a weight without a gradient has no count of its own
            for role in self.roles:
                if role not in state:
                    state[role] = torch.zeros_like(weight)
        for group in self.param_groups:
            weights: Tensors = [weight for weight in group["params"] if weight.grad is not None]
            if weights:
                gradients = [weight.grad.to(weight.dtype) for weight in weights if weight.grad is not None]
                if self.skip is not None:  # they may be NaN
                    gradients = [gradient.where(self.skip == 0, 0.0) for gradient in gradients]
                self.update(group, weights, gradients, [[self.state[each][role] for each in weights] for role in self.roles])
        self.skip = None

    def taken(self, like: torch.Tensor) -> torch.Tensor | float:
        """Return 1 if the step is taken, and 0 if not: on the device, of the dtype of `like`, where the host does not know."""
        return taken(self.skip, like)


def taken(skip: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor | float:
    """Return 1 − skip, of the dtype of `like`, in which products with settings are as exact as those of numbers; None: 1."""
    return 1.0 if skip is None else 1 - skip.to(like.dtype)
