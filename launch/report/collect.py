"""Find the runs of a report, and read them once."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...config.lazy import numpy as np
from ...config.problems import ConfigError, Problem
from ..ranking import Standing
from ..run_folder import CONFIG, Run, planned_length, reached
from ..run_metrics import Metrics

TAIL = 20
"""A final training loss is the mean of the last twentieth of the steps."""


@dataclass(frozen=True)
class ReportedRun:
    """A run as a report shows it, read once.

    name       unique within the report
    config     as plain values; {} if it can't be read, with the reason in `fault`
    """

    name: str
    run: Run
    config: dict[str, Any]
    metrics: Metrics
    incidents: list[dict[str, Any]]
    fault: str = ""

    @property
    def length(self) -> tuple[str, int] | None:
        """The unit and the number of steps or tokens that the run is to take; None if the config does not say."""
        return planned_length(self.config)

    @property
    def reached(self) -> dict[str, int]:
        """The counters at the run's newest row: steps, tokens and samples."""
        return reached(self.metrics)

    @property
    def finished(self) -> bool:
        """True if the run has reached its length."""
        return self.length is not None and self.reached[self.length[0]] >= self.length[1]

    @property
    def diverged(self) -> bool:
        """True if the newest step has no finite loss, and no evaluation has found one since."""
        if not self.metrics.steps or "loss" in self.metrics.steps[-1]:
            return False
        evaluated = self.metrics["eval_loss"][0]
        return not len(evaluated) or int(evaluated[-1]) < self.metrics.steps[-1]["step"]

    @property
    def training_loss(self) -> float | None:
        """The mean training loss of the last twentieth of the steps; None without a step, or if the last has no finite loss."""
        rows = self.metrics.steps[-max(1, len(self.metrics.steps) // TAIL) :]
        if not rows or "loss" not in rows[-1]:
            return None
        return float(np.mean([row["loss"] for row in rows if "loss" in row]))

    @property
    def validation_loss(self) -> float | None:
        """The last validation loss that was finite; None without one, and of a run that has diverged."""
        losses = self.metrics["eval_loss"][1]
        return float(losses[-1]) if len(losses) and not self.diverged else None

    @property
    def standing(self) -> Standing:
        """The values by which the run is ranked."""
        return Standing(self.training_loss, self.validation_loss, self.finished)


def find_runs(paths: Sequence[Path]) -> list[ReportedRun]:
    """Read every run in or under these folders. Raises ConfigError for each folder without any."""
    folders = find_folders(paths)
    return [_read(name, folder) for name, folder in zip(_names(folders), folders, strict=True)]


def find_folders(paths: Sequence[Path]) -> list[Path]:
    """Return the folder of every run in or under these folders, once each. Raises ConfigError for each folder without any."""
    problems: list[Problem] = []
    folders: dict[Path, Path] = {}
    for path in paths:
        found = [path] if Run(path).is_run else sorted(file.parent for file in path.rglob(CONFIG) if _has_begun(file.parent))
        if not found:
            what = "holds no run" if path.is_dir() else "is no folder"
            problems.append(Problem(str(path), what, f"give a run's output_dir (it has a {CONFIG}), or a folder of runs"))
        for folder in found:
            folders.setdefault(folder.resolve(), folder)
    if problems:
        raise ConfigError(problems)
    return list(folders.values())


def _has_begun(folder: Path) -> bool:
    """Return whether a folder with a config.yaml is a run's: Hydra and others have files of that name, too."""
    return any((folder / name).exists() for name in ("run.json", "metrics.jsonl"))


def _read(name: str, folder: Path) -> ReportedRun:
    run, fault, config = Run(folder), "", dict[str, Any]()
    try:
        config = run.config
    except ConfigError as error:
        fault = str(error.problems[0])
    return ReportedRun(name, run, config, run.metrics, run.incidents, fault)


def _names(folders: Sequence[Path]) -> list[str]:
    """Name folders by what differs in their paths; a single one by its last part."""
    whole = [folder.resolve() for folder in folders]
    if len(whole) == 1:
        return [whole[0].name]
    common = Path(os.path.commonpath(whole))
    return [str(folder.relative_to(common)) if folder != common else folder.name for folder in whole]
