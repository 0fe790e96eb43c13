"""AGVM: adaptive gradient variance modulation, AdamW with a learning rate per kind of module (Xue et al., 2022).

With a large batch, the gradients of some modules are already nearly free of noise while others' are not. AGVM measures how
much two halves of a batch disagree about each module and slows down or speeds up modules until they disagree as much as
the anchor does.

At the steps where `wants_halves`, the engine calls `observe_halves(first)` after the gradient is complete and before it is
clipped. It passes the part of each gradient that came from the first half of the batch, in the order of the parameters, sharded
and scaled as `.grad` is. That is a copy of the (reduced) gradient after the passes over the first half of the global list of
micro-batches (`data/assignment.py`); the other half is the difference. So every layout compares the same samples, if
`batch.micro` is the same.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ...config.problems import ConfigError, Problem
from .adamw import AdamW
from .config import MODULES, OTHER, AGVMConfig
from .parameters import NamedParameter, Shards

FLOOR = 1e-6  # keeps the ratio of two disagreements finite where halves agree


class AGVM(AdamW):
    """AdamW whose rate for each kind of module i is lr · s_i.

    D_i = 1 − cos(a_i, b_i), a and b the halves' gradients of module i, preconditioned by 1 / (√v + eps);
    μ_i = √clamp(D_anchor / D_i, 0.5, 10);  s_i ← smoothing · s_i + (1 − smoothing) · μ_i
    """

    def __init__(self, config: AGVMConfig, parameters: Sequence[NamedParameter], shards: Shards) -> None:
        patterns = {name: re.compile(written) for name, written in (config.modules or MODULES).items()}
        self._names = [*patterns, OTHER]
        self._label: Callable[[str], str] = lambda name: next((k for k, p in patterns.items() if p.search(name)), OTHER)
        self._module = torch.tensor([self._names.index(self._label(p.name)) for p in parameters])
        self._shards = shards
        self._parameters = list(parameters)
        self._interval, self._begin, self._anchor = config.interval, config.begin, config.anchor
        self._smoothing, self._eps = config.smoothing, config.eps
        self._measured: dict[str, float] | None = None  # the scales of the step about to be taken
        super().__init__(config, parameters, shards, label=self._label)

    @property
    def masked_step(self) -> bool:
        """False: the scales of modules and their updates are counted on the host. See `MaskedStep`."""
        return False

    @property
    def wants_halves(self) -> bool:
        """True if the step about to be taken is measured; never the first, before there are second moments."""
        updates = int(self._counters.get("updates", 0))
        return updates >= max(1, self._begin) and updates % self._interval == 0

    @property
    def scales(self) -> dict[str, float]:
        """The factor s_i of each module, for the step about to be taken."""
        # Those measured for a step that is not taken are measured again for the next, which then is the same update.
        return self._taken_scales() if self._measured is None else self._measured

    def _taken_scales(self) -> dict[str, float]:
        """Return the factors of the last step that was taken."""
        return {name: float(self._counters.get(f"scale.{name}", 1.0)) for name in self._names}

    @property
    def _counters(self) -> dict[str, Any]:
        """The state of one parameter: counters are the same in all."""
        return self.state[self._parameters[0].tensor]

    def initial_counters(self) -> dict[str, float]:
        """Return a factor of 1 for every module: each begins at the scheduled rate."""
        return {f"scale.{name}": 1.0 for name in self._names}

    @torch.no_grad()
    def observe_halves(self, first: Sequence[torch.Tensor]) -> None:
        """Measure the disagreement of halves and update the factors. first: parallel to the parameters; see the module.

        Takes one collective, and one more between pipeline stages. The host waits here for a GPU, because it needs the
        rates as numbers in this very step. Raises ConfigError if a half used some weight not at all.
        """
        self._refuse_unused(len(first))
        products: list[torch.Tensor] = []
        for parameter, half in zip(self._parameters, first, strict=True):
            assert parameter.tensor.grad is not None
            condition = self.state[parameter.tensor]["exp_avg_sq"].sqrt() + self._eps
            a, b = half / condition, (parameter.tensor.grad - half) / condition
            products.append(torch.stack([(a * b).sum(), a.square().sum(), b.square().sum()]).double())
        whole_P3 = self._shards.sum(torch.stack(products), self._parameters)
        self._module = self._module.to(whole_P3.device)  # copied once, because the host waits for it
        modules_M3 = whole_P3.new_zeros(len(self._names), 3).index_add_(0, self._module, whole_P3)
        dot, a_square, b_square = self._shards.across_stages(modules_M3).unbind(dim=1)
        length = (a_square * b_square).sqrt()
        disagreement = torch.where(length > 0, 1 - dot / length, torch.nan).tolist()
        measure = disagreement[self._names.index(self._anchor)]
        scales = self._taken_scales()
        for name, there in zip(self._names, disagreement, strict=True):
            if there == there and measure == measure:  # a module of no parameters, or without gradient, keeps its scale
                ratio = min(10.0, max(0.5, (measure + FLOOR) / (there + FLOOR)))
                scales[name] = self._smoothing * scales[name] + (1 - self._smoothing) * ratio**0.5
        self._measured = scales

    def _refuse_unused(self, in_first_half: int) -> None:
        """Raise ConfigError unless every weight has a gradient in both halves. Models of a user's own may leave some out."""
        without = [parameter.name for parameter in self._parameters if parameter.tensor.grad is None]
        if without or in_first_half < len(self._parameters):
            which = f"{without[0]} has none" if without else "in the first half some weights have none"
            text = f"agvm compares the gradients of a batch's halves, and {which}"
            raise ConfigError([Problem("optim", text, "use another optimizer, or a model that uses all its weights")])

    def _store(self, scales: Mapping[str, float], updates: int) -> None:
        for parameter in self._parameters:
            state = self.state[parameter.tensor]
            state.update({f"scale.{name}": scale for name, scale in scales.items()}, updates=updates)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take one update, each module at its own rate."""
        assert closure is None
        updates = int(self._counters.get("updates", 0))
        scales, self._measured = self.scales, None
        rates = [group["lr"] for group in self.param_groups]
        for group in self.param_groups:
            group["lr"] *= scales[group["label"]]
        super().step()
        for group, rate in zip(self.param_groups, rates, strict=True):
            group["lr"] = rate
        self._store(scales, updates + 1)
