"""AdaGrad and AdaGrad-Norm. Together with `batch=norm_test` they are AdAdaGrad and AdAdaGrad-Norm (arXiv 2402.11215)."""

# pyright: reportPrivateImportUsage=false
# torch does not export its operations on lists (_foreach_…), which its own optimizers use.

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.optim.adagrad import adagrad

from .config import AdaGradConfig, AdaGradNormConfig, base_rate
from .parameters import NamedParameter, Shards, decay_groups, members_with_gradients


class AdaGrad(torch.optim.Optimizer):
    """AdaGrad: w ← w − lr · g / (√Σg² + eps), element by element (Duchi et al. 2011). The update is torch's.

    `weight_decay` is added to the gradient (not decoupled).

    Not derived from `torch.optim.Adagrad`: DeepSpeed replaces such an optimizer by a new one without its groups' decay and
    rates. There is no state before the first step, because DeepSpeed takes that step on tensors of its own.
    """

    def __init__(self, config: AdaGradConfig, parameters: Sequence[NamedParameter], shards: Shards) -> None:
        self._initial = config.initial
        super().__init__(decay_groups(parameters, config.weight_decay), {"lr": base_rate(config), "eps": config.eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take one update."""
        assert closure is None
        for group in self.param_groups:
            weights: list[torch.Tensor] = [weight for weight in group["params"] if weight.grad is not None]
            gradients = [weight.grad for weight in weights if weight.grad is not None]
            for weight in weights:
                state = self.state[weight]
                if "sum" not in state:
                    state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
                    state["sum"] = torch.full_like(weight, self._initial)
            sums, steps = ([self.state[weight][key] for weight in weights] for key in ("sum", "step"))
            settings = {key: group[key] for key in ("lr", "weight_decay", "eps")}
            adagrad(weights, gradients, sums, steps, foreach=True, lr_decay=0.0, maximize=False, **settings)


class AdaGradNorm(torch.optim.Optimizer):
    """AdaGrad-Norm: B² ← B² + ‖g‖²; w ← w − (lr / B) · g, one B for the model (Ward et al., arXiv 1806.01811).

    `weight_decay` is added to the gradient (not decoupled); `initial` is B² at the start.
    """

    def __init__(self, config: AdaGradNormConfig, parameters: Sequence[NamedParameter], shards: Shards) -> None:
        self._shards, self._initial = shards, config.initial
        self._by_name = {parameter.name: parameter for parameter in parameters}
        super().__init__(decay_groups(parameters, config.weight_decay), {"lr": base_rate(config)})
        # One number, shared by all states: a counter in the sense of parameters.py.
        self._accumulator = torch.full((), config.initial, dtype=torch.float64, device=parameters[0].tensor.device)
        for parameter in parameters:
            self.state[parameter.tensor]["accumulator"] = self._accumulator

    def initial_counters(self) -> dict[str, float]:
        """Return B² at the start."""
        return {"accumulator": self._initial}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take one update, with one collective, and one more between pipeline stages."""
        assert closure is None
        pieces: list[tuple[dict[str, Any], list[NamedParameter], list[torch.Tensor]]] = []
        for group in self.param_groups:
            members, weights, gradients = members_with_gradients(group, self._by_name)
            if members:
                decayed = torch._foreach_add(gradients, weights, alpha=group["weight_decay"])
                pieces.append((group, members, list(decayed)))
        if not pieces:
            return
        norms = torch._foreach_norm([gradient for *_, gradients in pieces for gradient in gradients])
        squares = torch.stack(norms).double().square()
        per_parameter = self._shards.sum(squares, [member for _, members, _ in pieces for member in members])
        self._accumulator += self._shards.across_stages(per_parameter.sum())
        scale = self._accumulator.rsqrt()
        for group, members, gradients in pieces:
            torch._foreach_mul_(gradients, scale.to(gradients[0].dtype))
            torch._foreach_add_([member.tensor for member in members], gradients, alpha=-group["lr"])
