"""Evaluation: mean loss on the first samples of the validation set, the same on every layout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...config.duration import Duration, Unit
from ...data.batch import MicroBatch
from ..loop import Loop
from .base import Hook


class Evaluation(Hook):
    """Evaluates on the validation set at regular intervals, and at the end.

    micro_batches  this rank's share of the validation samples; as many on every rank
    every          interval: evaluate after each step that reaches or passes a multiple of it; None: only at the end
    """

    def __init__(self, micro_batches: Sequence[MicroBatch], every: Duration | None) -> None:
        self._micro_batches = micro_batches
        self._every = every

    def _evaluate(self, loop: Loop) -> None:
        loop.deliver_metrics(keep=0)
        loss = loop.engine.evaluate(self._micro_batches)
        row: dict[str, Any] = {"step": loop.progress.step, "eval_loss": float(loss.mean), "tokens": loop.progress.tokens}
        for hook in loop.hooks:
            hook.on_evaluate(loop, row)
        loop.restart_clock()

    def on_step_end(self, loop: Loop) -> None:
        """Evaluate if an evaluation is due; it always is after the last step."""
        if loop.finished or (self._every is not None and _is_due(self._every, loop)):
            self._evaluate(loop)


def _is_due(every: Duration, loop: Loop) -> bool:
    """Return whether the last step reached or passed a multiple of `every`. A function of the counters only (rule R5)."""
    unit = loop.horizon.unit if every.unit is Unit.FRACTION else every.unit
    length = loop.horizon.amount(every, unit)
    now = loop.horizon.position(loop.progress, unit)
    before = now - loop.horizon.stride(loop.progress, unit)
    return now // length > before // length
