"""Weights of one data-parallel rank: compute in low precision beside fp32 masters, with nothing to gather or reduce.

FSDP2 casts every weight anew in each pass, copies gradients into its buffers and widens them to fp32 before it reduces them.
One rank has nobody to reduce with (tensor parallelism adds up what it must by itself): its forward pass reads low-precision
weights that change once per update, and a gradient goes to the optimizer as the backward pass made it. The numbers are
FSDP2's: widening a gradient changes none, and micro-batches are summed in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from ..models.llama import Llama
from .shards import local, own_part


def materialize(model: Llama, dtype: torch.dtype, device: torch.device) -> None:
    """Give a model on the meta device storage without values. A tied head stays tied."""
    model.to(dtype)
    model.to_empty(device=device)
    if model.tied and model.head is not None and model.embed is not None:
        model.head.weight = model.embed.weight


class MasterWeights:
    """fp32 masters of this rank's parts of low-precision parameters, by name: what optimizers and checkpoints see.

    A gradient moves to its master, in the middle of the backward pass, as soon as it is complete.
    """

    def __init__(self, computed: Mapping[str, nn.Parameter]) -> None:
        """computed: the model's parameters in the dtype of the compute, on their device; their values don't matter."""
        self._computed = {name: local(parameter) for name, parameter in computed.items()}
        self.masters = {
            name: nn.Parameter(torch.empty_like(local(parameter), dtype=torch.float32)) for name, parameter in computed.items()
        }
        self._copied = dict.fromkeys(computed, -1)  # version of each master when it was last copied; −1: to be copied
        self._narrow = False
        for name, parameter in computed.items():
            master = self.masters[name]
            master.grad_dtype = None  # any will do
            parameter.register_post_accumulate_grad_hook(self._delivery(master))

    def _delivery(self, master: nn.Parameter) -> Callable[[torch.Tensor], None]:
        @torch.no_grad()
        def deliver(computed: torch.Tensor) -> None:
            assert computed.grad is not None
            gradient, computed.grad = own_part(computed.grad, computed), None
            if master.grad is not None:
                master.grad += gradient
            else:
                master.grad = gradient if self._narrow else gradient.to(master.dtype)

        return deliver

    def begin(self, narrow: bool) -> None:
        """Before the first forward pass of a step. narrow: its only gradient may keep the dtype that it was computed in."""
        self._narrow = narrow
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Bring the low-precision weights up to date with the masters that were written to since."""
        stale = [name for name, master in self.masters.items() if self._copied[name] != master._version]
        if stale:
            torch._foreach_copy_([self._computed[name] for name in stale], [self.masters[name] for name in stale])
            self._copied.update((name, self.masters[name]._version) for name in stale)

    def updated(self, copied: bool) -> None:
        """After an update, which fused kernels leave no trace of. copied: it wrote the low-precision weights too."""
        self._copied = {name: master._version if copied else -1 for name, master in self.masters.items()}
        self.refresh()
