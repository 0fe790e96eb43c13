"""Evaluation of a run on benchmark tasks of lm-eval, at regular intervals and at the end."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from ...config.duration import Duration
from ...data.tokenizer import Tokenizer
from ...models.protocol import Model
from ...parallel.heartbeat import Phase
from ..all_ranks import raise_on_all_ranks
from ..loop import Loop
from ..tasks.config import TasksConfig
from ..whole_model import gather_whole_model
from .base import Hook
from .evaluation import is_due

if TYPE_CHECKING:
    from ..tasks.evaluation import Tasks


class TaskEvaluation(Hook):
    """Evaluates on tasks, under any layout: the weights are gathered whole on every rank, and requests divided among the ranks.

    build   makes the model on the meta device
    dtype   in which it computes
    begins  id of the token before a text that has none; None: the end of a document
    """

    def __init__(
        self, config: TasksConfig, build: Callable[[], Model], tokenizer: Tokenizer, dtype: torch.dtype, begins: int | None
    ) -> None:
        self._config, self._build, self._tokenizer = config, build, tokenizer
        self._dtype, self._begins = dtype, begins
        self._every = None if config.every is None else Duration.parse(config.every)
        self._tasks: Tasks | None = None

    def on_run_begin(self, loop: Loop) -> None:
        """Load the tasks and their data. Raises ConfigError on all ranks for those that can't be loaded."""
        from ..tasks.evaluation import Tasks, log_quietly

        log_quietly(loop.mesh.is_main)
        self._tasks = raise_on_all_ranks(loop.mesh, lambda: Tasks.load(self._config))

    def on_step_end(self, loop: Loop) -> None:
        """Evaluate if it is due; it always is after the last step."""
        if loop.finished or (self._every is not None and is_due(self._every, loop)):
            self._evaluate(loop)

    def _evaluate(self, loop: Loop) -> None:
        from ..tasks.language_model import LanguageModel

        assert self._tasks is not None, "on_run_begin has loaded them"
        progress = loop.progress
        loop.deliver_metrics(keep=0)
        if loop.progress is not progress:  # the step is taken again, and evaluated then
            return
        loop.mesh.heartbeat.beat(Phase.EVALUATION)
        whole = gather_whole_model(self._build(), loop.engine, loop.mesh, self._dtype)
        model = LanguageModel(whole, self._tokenizer, loop.horizon.seq_len, loop.mesh, self._begins)
        row: dict[str, Any] = {"step": progress.step, "tokens": progress.tokens}
        row |= {value.key: value.value for value in self._tasks.evaluate(model)}
        loop.mesh.heartbeat.beat(Phase.HOOKS)
        for hook in loop.hooks:
            hook.on_tasks(loop, row)
        loop.restart_clock()
