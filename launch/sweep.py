"""Run every job of a sweep through Hydra, whose launchers may use other machines, and say at its end how each did."""

from __future__ import annotations

import contextlib
import importlib
import sys
import traceback
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

from ..config.compose import FAULTS, HYDRA_VERSION, RECIPES_MODULE, ROOT
from ..config.fixes import reason_of
from ..config.overrides import quoted, task_overrides
from ..config.problems import ConfigError, Problem
from ..config.sweeps import job_folder, without_output_dir
from ..trainer.identity import METRICS
from ..trainer.schema import register_schemas
from .run_metrics import Metrics, last_numbers, shown_numbers


@dataclass(frozen=True)
class Outcome:
    """The end of a job of a sweep.

    code   the run's exit code; None: not begun
    stop   number of the signal that asked it to stop; 0: none did
    """

    folder: str
    code: int | None
    stop: int = 0

    def __str__(self) -> str:
        """One row of the table at the end of a sweep: the folder, how it ended, and its last numbers."""
        ended = "not begun" if self.code is None else "finished" if not self.code else f"exit code {self.code}"
        numbers = last_numbers(Metrics.read(Path(self.folder) / METRICS)) if self.code is not None else {}
        return "  ".join([self.folder, "asked to stop" if self.stop and not self.code else ended, *shown_numbers(numbers)])


def run_sweep(
    overrides: Sequence[str], config_dir: str | None, run: Callable[[list[str]], tuple[int | None, int]]
) -> list[Outcome]:
    """Run every job, and return how each ended. Raises ConfigError if Hydra can't start the sweep.

    run: overrides of a job → exit code, or None if it was not begun, and the number of the signal that stopped it, or 0;
         called in a process of its own by some launchers, to which cloudpickle sends it
    """
    words = list(overrides)

    def task(config: DictConfig) -> Outcome:
        job = without_output_dir(task_overrides())
        folder = job_folder(config.output_dir, words, task_overrides())
        try:
            code, stop = run([*job, f"output_dir={quoted(folder)}"])
        except Exception:  # raised, it would become Hydra's message, and end the jobs to come
            traceback.print_exc()
            code, stop = 1, 0
        return Outcome(folder, code, stop)

    register_schemas()
    joined = [] if config_dir is None else [f"hydra.searchpath=[{quoted(f'file://{Path(config_dir).resolve()}')}]"]
    outer = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with initialize_config_module(RECIPES_MODULE, version_base=HYDRA_VERSION), _announced_jobs():
            hydra = GlobalHydra.instance().hydra
            assert hydra is not None
            batches: Any = hydra.multirun(ROOT, task, [*joined, *words])
    except FAULTS as error:
        raise ConfigError([Problem("sweep", *reason_of(error))]) from error
    finally:
        if outer is not None:
            GlobalHydra.instance().initialize(outer)
    return [job.return_value for batch in batches for job in batch]


@contextlib.contextmanager
def _announced_jobs() -> Generator[None]:
    """Print the number and the log of every job that submitit sends off: Hydra's launcher tells neither."""
    try:
        executor = importlib.import_module("submitit").AutoExecutor
    except ImportError:
        yield
        return
    submit = executor.map_array

    def announcing(self: Any, function: Any, *arguments: Any) -> Any:
        jobs: Any = submit(self, function, *arguments)
        for job, words in zip(jobs, arguments[0], strict=True):  # the launcher's first argument is each job's overrides
            print(f"job {job.job_id}: {' '.join(words)}; log {job.paths.stdout}, errors {job.paths.stderr}", file=sys.stderr)
        return jobs

    executor.map_array = announcing
    try:
        yield
    finally:
        executor.map_array = submit
