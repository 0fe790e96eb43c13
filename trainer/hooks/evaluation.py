"""Evaluation: mean loss on the first samples of each validation set, the same on every layout."""

from __future__ import annotations

import logging
import math
import operator
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...config.duration import Duration, Unit
from ...data.batch import MicroBatch
from ...parallel.engine import StepLoss
from ...parallel.heartbeat import Phase
from ..loop import Loop
from .base import Hook
from .expert_map import mutual_information

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvaluationSet:
    """This rank's share of the validation samples of one source or named set.

    name    "" where there is but one source
    weight  of its loss in the mean; 0: it is evaluated apart only
    micro_batches  as many on every rank, but under hybrid data parallelism with ZeRO-0 and 1
    """

    name: str
    weight: float
    micro_batches: Sequence[MicroBatch]


def counted_weights(weights: Sequence[float]) -> list[float]:
    """Return the weights with which sets count: alike where there are named sets alone, whose weights are 0."""
    return list(weights) if any(weights) else [1.0] * len(weights)


def weighted_mean(weights: Sequence[float], found: Sequence[StepLoss], values: Sequence[float]) -> float:
    """Return the mean of a value of each set by weight; 0 where none has a target.

    A set without a target says nothing, and its 0 has no place in the mean.
    """
    weights = [weight if float(loss.tokens) else 0.0 for weight, loss in zip(weights, found, strict=True)]
    return math.fsum(map(operator.mul, weights, values)) / math.fsum(weights) if any(weights) else 0.0


class Evaluation(Hook):
    """Evaluates on the validation set at regular intervals, and at the end; the sources of a mixture apart.

    sets   one for each source
    every  interval: evaluate after each step that reaches or passes a multiple of it; None: only at the end
    layers  those with a mixture of experts
    """

    def __init__(self, sets: Sequence[EvaluationSet], every: Duration | None, layers: Sequence[int] = ()) -> None:
        self._sets, self._layers = sets, layers
        self._weights = counted_weights([each.weight for each in sets])
        self._every = every

    def _evaluate(self, loop: Loop) -> None:
        if not loop.deliver_metrics(keep=0):  # the step is taken again, and evaluated then
            return
        began = time.monotonic()
        loop.mesh.heartbeat.beat(Phase.EVALUATION)
        found: list[StepLoss] = []
        routed: dict[str, torch.Tensor] = {}
        for each, counted in zip(self._sets, self._weights, strict=True):
            found.append(loop.engine.evaluate(each.micro_batches))
            if (counts := loop.engine.assignments()) is not None and counted and float(found[-1].tokens):
                routed[each.name] = counts
        losses = [float(loss.mean) for loss in found]
        silent = [each.name or "the data" for each, loss in zip(self._sets, found, strict=True) if not float(loss.tokens)]
        if silent and loop.mesh.is_main:
            text = "step %d: no held-out sample of %s has a target, so its loss says nothing"
            log.warning(text, loop.progress.step, ", ".join(silent))
        row: dict[str, Any] = {
            "step": loop.progress.step,
            "eval_loss": weighted_mean(self._weights, found, losses),
            "tokens": loop.progress.tokens,
        }
        row |= {f"validation/{each.name}/loss": loss for each, loss in zip(self._sets, losses, strict=True) if each.name}
        if loop.stage is not None:
            row["stage"] = loop.stage.name
        if routed:
            row |= self._specialisation(loop, routed)
        loop.mesh.heartbeat.beat(Phase.HOOKS)
        loop.mesh.heartbeat.learn(Phase.EVALUATION, time.monotonic() - began)
        for hook in loop.hooks:
            hook.on_evaluate(loop, row)
        loop.restart_clock()

    def _specialisation(self, loop: Loop, routed: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """Show the hooks what each source was routed to. Returns the mutual information of source and expert by layer.

        routed: of the sets that have a place in the mean loss. Padding is routed alike in all, and named sets are no sources.
        """
        for hook in loop.hooks:
            hook.on_routed(loop, routed)
        if len(routed) < 2:
            return {}
        information = mutual_information(torch.stack(list(routed.values()))).tolist()
        return {f"experts/{layer}/information": value for layer, value in zip(self._layers, information, strict=True)}

    def on_step_end(self, loop: Loop) -> None:
        """Evaluate if an evaluation is due; it always is after the last step."""
        if loop.finished or (self._every is not None and is_due(self._every, loop)):
            self._evaluate(loop)


def is_due(every: Duration, loop: Loop) -> bool:
    """Return whether the last step reached or passed a multiple of `every`. A function of the counters only (rule R5)."""
    unit = loop.horizon.unit if every.unit is Unit.FRACTION else every.unit
    length = loop.horizon.amount(every, unit)
    now = loop.horizon.position(loop.progress, unit)
    before = now - loop.horizon.stride(loop.progress, unit)
    return now // length > before // length
