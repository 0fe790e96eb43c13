"""Load tasks of lm-eval, and evaluate a whole model on them."""

from __future__ import annotations

import contextlib
import difflib
import logging
import random
import sys
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from functools import partialmethod
from typing import TYPE_CHECKING, Any

import numpy as np

from ...config.cache import expand_user
from ...config.problems import ConfigError, Problem
from ...config.words import first_line
from ...data.documents.formats import import_extra
from ..all_ranks import raise_on_all_ranks
from .config import TasksConfig
from .scoring import LongerThanContext

if TYPE_CHECKING:
    from ...parallel.mesh import Mesh
    from .language_model import LanguageModel

UNVERSIONED = "Yaml"
"""The version by lm-eval of a task without one."""
_SEED = 1234  # lm-eval's own, for few-shot examples and for tasks that draw
_BOOTSTRAPS = 100_000  # lm-eval's own, for errors of metrics that are no means
_PAGE = "docs/tasks.md"


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
            fix = f"is the machine offline? Tasks from local files need no network: {_PAGE}"
            message = f"a task can't be loaded: {first_line(error)}"
            raise ConfigError([Problem("tasks.names", message, fix)]) from error
        problems = [each for name, task in loaded["tasks"].items() for each in _unsupported(name, task)]
        if problems:
            raise ConfigError(problems)
        for task in loaded["tasks"].values():
            _choose_shots(task, config.few_shot)
        return cls(config, loaded)

    def check(self, model: LanguageModel) -> None:
        """Build all requests, and compare them with the model's context. Local: nothing is computed.

        Raises ConfigError for a task that can't be built, or asks for more than the context.
        """
        for name, task in self.loaded["tasks"].items():
            try:
                with self._prepared(quiet=True):
                    task.build_all_requests(limit=self.config.limit)
                    model.check(task.instances)
            except LongerThanContext as error:
                fix = "give a longer context, or leave the task out"
                raise ConfigError([Problem("tasks.names", f"'{name}': {error}", fix)]) from error
            except Exception as error:  # a task's templates and functions raise anything
                message = f"questions of '{name}' can't be built: {first_line(error)}"
                raise ConfigError([Problem("tasks.names", message, "mend the task, or leave it out")]) from error

    def evaluate(self, model: LanguageModel, mesh: Mesh, *, errors: bool = False) -> list[TaskValue]:
        """Evaluate a model on all of them. Collective: every process calls it, and gets the same values.

        errors: with standard errors, on the main process, and lm-eval's progress bars there

        Raises on all processes where one fails.
        """
        evaluator = import_extra("lm_eval.evaluator", "lm_eval", "an evaluation on tasks")
        with_errors = errors and mesh.is_main
        fault: Exception | None = None
        results: Any = None
        try:
            with self._prepared(quiet=not with_errors):
                results = evaluator.evaluate(
                    model,
                    self.loaded,
                    limit=self.config.limit,
                    bootstrap_iters=_BOOTSTRAPS if with_errors else 0,
                    log_samples=False,
                )
        except Exception as error:  # metrics and filters of tasks raise anything
            if model.failed_together:
                raise
            fault = error

        def outcome() -> list[TaskValue]:
            if fault is not None:
                raise fault
            return task_values(results)

        # A process on which lm-eval itself failed votes here, while the others vote in the model's next method, or here.
        return raise_on_all_ranks(mesh, outcome)

    @contextlib.contextmanager
    def _prepared(self, *, quiet: bool) -> Generator[None]:
        """Draw the same few-shot examples each time, and keep standard output for the command's own."""
        with _kept_random_state(), contextlib.redirect_stdout(sys.stderr), _progress_bars(visible=not quiet):
            for task in self.loaded["tasks"].values():
                task.set_fewshot_seed(seed=_SEED)
            yield


def _unsupported(name: str, task: Any) -> Generator[Problem]:
    """Yield why a task can't be evaluated at all."""
    fix = "leave it out"
    if getattr(task, "UNSAFE_CODE", False):
        yield Problem("tasks.names", f"'{name}' runs code that the model writes, which is not done here", fix)
    if getattr(task, "MULTIMODAL", False):
        yield Problem("tasks.names", f"'{name}' has pictures or sounds, and the model reads text", fix)


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
    """Set a task's number of solved examples; 0 stays where the task asks for none."""
    own = task.get_config("num_fewshot")
    if own is None or (few_shot is not None and own != 0):
        task.set_config(key="num_fewshot", value=few_shot or 0)


def task_values(results: Mapping[str, Any]) -> list[TaskValue]:
    """Return the numbers in lm-eval's results: of tasks in the order of the results, groups among them."""
    found: list[TaskValue] = []
    for task, numbers in results["results"].items():
        for name, value in numbers.items():
            metric, comma, kind = name.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = numbers.get(f"{metric}_stderr,{kind}")
            higher = results.get("higher_is_better", {}).get(task, {}).get(metric)
            samples = results.get("n-samples", {}).get(task, {}).get("effective")
            shots, version = results.get("n-shot", {}).get(task), results.get("versions", {}).get(task, UNVERSIONED)
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


@contextlib.contextmanager
def _progress_bars(*, visible: bool) -> Generator[None]:
    """Show lm-eval's progress bars, or leave them out: it has no switch for all of them."""
    bar = import_extra("tqdm", "lm_eval", "an evaluation on tasks").tqdm
    before = bar.__init__
    if not visible:
        bar.__init__ = partialmethod(before, disable=True)
    try:
        yield
    finally:
        bar.__init__ = before


def log_quietly(main: bool) -> None:
    """Leave out lm-eval's chatter: what it warns of stays, on the main process."""
    logging.getLogger("lm_eval").setLevel(logging.WARNING if main else logging.ERROR)
