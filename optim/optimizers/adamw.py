"""AdamW on local shards. The update of an element needs only that element, so there is no communication."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from ...kernels.loss import runs_triton
from ...kernels.rounding import KeptWeight
from .config import AdamWConfig, base_rate
from .parameters import NamedParameter, Shards, decay_groups

FUSED_DEVICES = ("cuda", "cpu")


def have_kernels(weights: Iterable[torch.Tensor]) -> bool:
    """Return whether our own kernels can update these weights: fp32, on a GPU with Triton."""
    return all(weight.dtype == torch.float32 and runs_triton(weight) for weight in weights)


class AdamW(torch.optim.AdamW):
    """Adam with decoupled weight decay (Loshchilov and Hutter, arXiv 1711.05101).

    label  see `decay_groups`

    By default (`optim.fused` null) the update is one kernel where all shards are floating-point tensors on a device that
    has it. For fp32 weights on a GPU with Triton that is our own kernel, a `FusedStep`; otherwise torch's.
    """

    gradient_scale: torch.Tensor | None = None
    skip: torch.Tensor | None = None
    kept: Mapping[torch.Tensor, KeptWeight] | None = None

    def __init__(
        self,
        config: AdamWConfig,
        parameters: Sequence[NamedParameter],
        shards: Shards,
        label: Callable[[str], str] | None = None,
    ) -> None:
        first, second = config.betas
        fused = config.fused
        if fused is None:
            fused = all(p.tensor.device.type in FUSED_DEVICES and p.tensor.is_floating_point() for p in parameters)
        super().__init__(
            decay_groups(parameters, config.weight_decay, label),
            lr=base_rate(config),
            betas=(first, second),
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=fused or None,
            foreach=None if fused else True,
        )
        self._compute_copies = {p.tensor: p.compute_copy for p in parameters if p.compute_copy is not None}
        self._fused = fused

    @property
    def fused_step(self) -> bool:
        """True where our own kernel does the step: see `FusedStep`."""
        return self._fused and have_kernels(tensor for group in self.param_groups for tensor in group["params"])

    @property
    def masked_step(self) -> bool:
        """True where the step is one kernel: ours and torch's can be skipped on the device. See `MaskedStep`."""
        return all(group["fused"] for group in self.param_groups)

    @property
    def rounded_step(self) -> bool:
        """True where our own kernel does the step: see `RoundedStep`."""
        return self.fused_step

    def forget_steps(self, count: int) -> None:
        """See `MaskedStep`. torch's own kernel counts on the device, and has not counted them."""
        if self.fused_step:
            for state in self.state.values():
                state["step"] -= count

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Take one update."""
        if not self.fused_step or closure is not None:
            assert self.gradient_scale is self.kept is None, "only the fused step scales gradients, and rounds weights"
            self.found_inf = self.skip  # torch's name for it; read with getattr by its fused kernel
            self.skip = None
            return super().step(closure)
        from ...kernels.triton_adamw import adamw_update

        kept = self.kept or {}
        for group in self.param_groups:
            settings = {key: group[key] for key in ("lr", "betas", "eps", "weight_decay")}
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if "exp_avg" not in state:
                    state["step"] = torch.zeros((), dtype=torch.float32)
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(weight), torch.zeros_like(weight)
                state["step"] += 1
                moments = state["exp_avg"], state["exp_avg_sq"]
                compute_copy = self._compute_copies.get(weight)
                adamw_update(
                    *(weight, weight.grad, *moments, compute_copy, self.gradient_scale, self.skip),
                    step=float(state["step"]),
                    kept=kept.get(weight),
                    **settings,
                )
        self.gradient_scale = self.skip = self.kept = None
        return None
