"""Evaluation of a run on benchmark tasks of lm-eval, at regular intervals and at the end.

What can be wrong with the tasks is found before the first step. If an evaluation fails later, the run warns and goes on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...config.duration import Duration
from ...config.per_host import after_first_on_host
from ...data.tokenizing.tokenizer import Tokenizer
from ...models.protocol import Model
from ...parallel.heartbeat import Phase
from ..all_ranks import PeerFailed, raise_on_all_ranks
from ..loop import Loop
from ..tasks.config import TasksConfig
from ..whole_model import gather_whole_model
from .base import Hook
from .evaluation import is_due

if TYPE_CHECKING:
    from ..tasks.evaluation import Tasks, TaskValue

log = logging.getLogger(__name__)


class TaskEvaluation(Hook):
    """Evaluates on tasks, under any layout: the weights are gathered whole on every rank, and requests divided among the ranks.

    build   makes the model on the meta device
    dtype   in which it computes
    prefix  id of the token before a text without context; None: the end of a document
    """

    def __init__(
        self, config: TasksConfig, build: Callable[[], Model], tokenizer: Tokenizer, dtype: torch.dtype, prefix: int | None
    ) -> None:
        self._config, self._build, self._tokenizer = config, build, tokenizer
        self._dtype, self._prefix = dtype, prefix
        self._every = None if config.every is None else Duration.parse(config.every)
        self._tasks: Tasks | None = None
        self._trained_step = self._evaluated_step = -1

    def on_run_begin(self, loop: Loop) -> None:
        """Load the tasks and their data, and check their requests. Raises ConfigError on all ranks where some are wrong."""
        from ..tasks.evaluation import Tasks, log_quietly
        from ..tasks.language_model import LanguageModel

        log_quietly(loop.mesh.is_main)

        def load() -> Tasks:
            tasks = after_first_on_host("tasks", lambda: Tasks.load(self._config))
            tasks.check(LanguageModel(self._build(), self._tokenizer, loop.horizon.seq_len, loop.mesh, self._prefix))
            return tasks

        self._tasks = raise_on_all_ranks(loop.mesh, load)

    def on_step_end(self, loop: Loop) -> None:
        """Evaluate if it is due; it always is after the last step of a stage."""
        self._trained_step = loop.progress.step
        if loop.at_end:  # of the run: nothing may come before its last save
            return
        if loop.finished or (self._every is not None and is_due(self._every, loop)):
            self._evaluate(loop)

    def on_run_end(self, loop: Loop, output_dir: Path) -> None:
        """Evaluate a last time, unless nothing was trained."""
        if self._evaluated_step < self._trained_step == loop.progress.step:
            self._evaluate(loop)

    def _evaluate(self, loop: Loop) -> None:
        if not loop.deliver_metrics(keep=0):  # the step is taken again, and evaluated then
            return
        progress = loop.progress
        loop.mesh.heartbeat.beat(Phase.TASKS)
        values = self._values_or_warn(loop)
        self._evaluated_step = progress.step
        loop.mesh.heartbeat.beat(Phase.HOOKS)
        if values is not None:
            row: dict[str, Any] = {"step": progress.step, "tokens": progress.tokens}
            row |= {value.key: value.value for value in values}
            for hook in loop.hooks:
                hook.on_tasks(loop, row)
        loop.restart_clock()

    def _values_or_warn(self, loop: Loop) -> list[TaskValue] | None:
        """Return the values; where the evaluation fails, which it does on all ranks alike, warn once and return None."""
        try:
            return self._values(loop)
        except Exception as error:  # of metrics and answers anything; of memory, too
            reason = None if isinstance(error, PeerFailed) else f"{type(error).__name__}: {error}"
        reasons = loop.mesh.gather_objects(reason)
        if loop.mesh.is_main:
            rank = next((rank for rank, each in enumerate(reasons) if each is not None), 0)
            message = "step %d: the evaluation on tasks failed on rank %d, and the run goes on without it (%s)"
            log.warning(message, loop.progress.step, rank, reasons[rank])
        return None

    def _values(self, loop: Loop) -> list[TaskValue]:
        from ..tasks.language_model import LanguageModel

        assert self._tasks is not None, "on_run_begin has loaded them"
        whole = gather_whole_model(self._build(), loop.engine, loop.mesh, self._dtype)
        model = LanguageModel(whole, self._tokenizer, loop.horizon.seq_len, loop.mesh, self._prefix)
        return self._tasks.evaluate(model, loop.mesh)
