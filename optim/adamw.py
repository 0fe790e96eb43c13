"""AdamW on local shards: the update of an element needs nothing but that element, so no rank asks another."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from .parameters import NamedParameter, Shards, decay_groups

FUSED_DEVICES = ("cuda", "cpu")


class AdamW(torch.optim.AdamW):
    """Adam with decoupled weight decay (Loshchilov and Hutter, arXiv 1711.05101), by torch.

    fused  one kernel for the whole update; None: where all shards are floating-point tensors on a device that has it
    label  see `decay_groups`
    """

    def __init__(
        self,
        parameters: Sequence[NamedParameter],
        shards: Shards,
        lr: float = 3e-4,
        weight_decay: float = 0.1,
        betas: Sequence[float] = (0.9, 0.95),
        eps: float = 1e-8,
        fused: bool | None = None,
        label: Callable[[str], str] | None = None,
    ) -> None:
        first, second = betas
        if fused is None:
            fused = all(p.tensor.device.type in FUSED_DEVICES and p.tensor.is_floating_point() for p in parameters)
        super().__init__(
            decay_groups(parameters, weight_decay, label),
            lr=lr,
            betas=(first, second),
            eps=eps,
            weight_decay=weight_decay,
            fused=fused or None,
            foreach=None if fused else True,
        )
