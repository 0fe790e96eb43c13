"""Evaluation: mean loss on the first samples of the validation set, the same on every layout."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..data.batch import IGNORED, MicroBatch, Sample, Samples
from .hooks import Hook
from .loop import Loop


def share_of_validation(samples: Samples, count: int, data_rank: int, data_size: int, micro: int) -> list[MicroBatch]:
    """This rank's micro-batches of samples [0, count), dealt round-robin.

    Every rank gets the same number of equally large micro-batches, because a rank that passes fewer through a sharded
    model would leave the others waiting. What is missing is filled with samples whose targets are all ignored.
    """
    rounds = -(-count // (data_size * micro))
    mine = [samples[index] for index in range(data_rank, count, data_size)]
    blank = Sample(samples[0].tokens, np.full_like(samples[0].targets, IGNORED), samples[0].documents)
    mine += [blank] * (rounds * micro - len(mine))
    return [MicroBatch.collate(mine[start : start + micro]) for start in range(0, len(mine), micro)]


class Evaluation(Hook):
    """Looks at the validation set every so many steps, and once at the end.

    every  steps between evaluations; None: only at the end
    """

    def __init__(self, micro_batches: list[MicroBatch], every: int | None) -> None:
        self._micro_batches = micro_batches
        self._every = every
        self._last_step = -1

    def _evaluate(self, loop: Loop) -> None:
        loop.deliver_metrics(keep=0)
        loss = loop.engine.evaluate(self._micro_batches)
        self._last_step = loop.progress.step
        row: dict[str, Any] = {"step": loop.progress.step, "eval_loss": float(loss.mean), "tokens": loop.progress.tokens}
        for hook in loop.hooks:
            hook.on_evaluate(loop, row)
        loop.restart_clock()

    def on_step_end(self, loop: Loop) -> None:
        """Evaluate when it is time to; the last step always is."""
        due = self._every is not None and loop.progress.step % self._every == 0
        if due or loop.finished:
            self._evaluate(loop)
