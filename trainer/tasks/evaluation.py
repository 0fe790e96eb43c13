"""Load tasks of lm-eval, and evaluate a whole model on them."""

from __future__ import annotations

import contextlib
import difflib
import logging
import random
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ...config.cache import expand_user
from ...config.problems import ConfigError, Problem
from ...data.formats import import_extra
from .config import TasksConfig

if TYPE_CHECKING:
    from .language_model import LanguageModel

UNVERSIONED = "Yaml"
"""What lm-eval says of a task without a version."""
_SEED = 1234  # lm-eval's own, for few-shot examples and for tasks that draw


@dataclass(frozen=True)
class TaskValue:
    """One metric of a task, or of a group of tasks.

    filter   of lm-eval: how answers were read; "none" for as they are
    error    standard error; None where there is none
    higher   whether more is better; None where the task does not say
    samples  questions; shots: solved examples before each
    """

    task: str
    metric: str
    filter: str
    value: float
    error: float | None
    higher: bool | None
    samples: int | None
    shots: int | None
    version: str

    @property
    def key(self) -> str:
        """Name among a run's metrics."""
        return f"tasks/{self.task}/{self.metric}" + ("" if self.filter == "none" else f"/{self.filter}")

    def as_json(self) -> dict[str, Any]:
        """Return everything but the task's name."""
        return {name: value for name, value in vars(self).items() if name != "task"}


@dataclass(frozen=True)
class Tasks:
    """Tasks that have been loaded, with their data: they can be evaluated again and again."""

    config: TasksConfig
    loaded: Any

    @classmethod
    def load(cls, config: TasksConfig) -> Tasks:
        """Find tasks by name, and load their data. Raises ConfigError for unknown tasks, and for data that can't be had."""
        manager = _manager(config)
        try:
            with _kept_random_state():
                loaded = manager.load(list(config.names))
        except Exception as error:  # data sets raise anything
            fix = "is the machine offline? Tasks from local files need no network: docs/evaluate.md"
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise ConfigError([Problem("tasks.names", f"a task can't be loaded: {reason}", fix)]) from error
        for task in loaded["tasks"].values():
            _choose_shots(task, config.few_shot)
        return cls(config, loaded)

    def evaluate(self, model: LanguageModel) -> list[TaskValue]:
        """Evaluate a model on all of them. Collective: every process calls it, and gets the same.

        Raises ConfigError for a task that asks for more than the model's context.
        """
        evaluator = import_extra("lm_eval.evaluator", "lm_eval", "an evaluation on tasks")
        try:
            with _kept_random_state():
                told = evaluator.evaluate(model, self.loaded, limit=self.config.limit, log_samples=False)
        except ValueError as error:
            raise ConfigError([Problem("tasks.names", str(error), "give a longer context, or leave the task out")]) from error
        return task_values(told)


def _manager(config: TasksConfig) -> Any:
    """Return lm-eval's index of tasks that knows all names. Its own thousands are read only where the folder lacks one."""
    library = import_extra("lm_eval.tasks", "lm_eval", "an evaluation on tasks")
    folder = None if config.folder is None else str(expand_user(config.folder))
    if folder is not None:
        own = library.TaskManager(include_path=folder, include_defaults=False)
        if set(config.names) <= set(own.all_tasks):
            return own
    manager = library.TaskManager(include_path=folder)
    known = set(manager.all_tasks)
    problems: list[Problem] = []
    for name in config.names:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            fix = f"did you mean {near[0]}?" if near else "list all with: lm_eval ls tasks"
            problems.append(Problem("tasks.names", f"lm-eval has no task '{name}'", fix))
    if problems:
        raise ConfigError(problems)
    return manager


def _choose_shots(task: Any, few_shot: int | None) -> None:
    """Set a task's number of solved examples; 0 stays where the task asks for none. And what they are drawn by."""
    own = task.get_config("num_fewshot")
    if own is None or (few_shot is not None and own != 0):
        task.set_config(key="num_fewshot", value=few_shot or 0)
    task.set_fewshot_seed(seed=_SEED)


def task_values(told: Mapping[str, Any]) -> list[TaskValue]:
    """Return the numbers in lm-eval's results: of tasks in the order in which it tells them, groups among them."""
    found: list[TaskValue] = []
    for task, numbers in told["results"].items():
        for name, value in numbers.items():
            metric, comma, kind = name.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = numbers.get(f"{metric}_stderr,{kind}")
            higher = told.get("higher_is_better", {}).get(task, {}).get(metric)
            samples = told.get("n-samples", {}).get(task, {}).get("effective")
            shots, version = told.get("n-shot", {}).get(task), told.get("versions", {}).get(task, UNVERSIONED)
            version = "" if version == UNVERSIONED else str(version)
            error = float(error) if isinstance(error, int | float) else None
            found.append(TaskValue(task, metric, kind, float(value), error, higher, samples, shots, version))
    return found


@contextlib.contextmanager
def _kept_random_state() -> Generator[None]:
    """Draw from lm-eval's own seeds, the same on every process, and leave the states of a run's generators as they were."""
    before = random.getstate(), np.random.get_state()
    random.seed(_SEED)
    np.random.seed(_SEED)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])


def log_quietly(main: bool) -> None:
    """Leave out lm-eval's chatter: what it warns of stays, on the main process."""
    logging.getLogger("lm_eval").setLevel(logging.WARNING if main else logging.ERROR)
