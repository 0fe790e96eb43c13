"""Read a run's folder: its config, metrics, incidents and checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import yaml

from ..config.problems import ConfigError, Problem
from ..trainer.identity import METRICS
from ..trainer.watch.incidents import read_incidents
from .run_metrics import Metrics

if TYPE_CHECKING:
    from .load import LoadedModel

CONFIG = "config.yaml"


@dataclass(frozen=True)
class Run:
    """A run's folder. It is read when it is asked, so a run that is still training can be looked at."""

    folder: Path

    @classmethod
    def open(cls, folder: str | Path) -> Run:
        """Open the folder of a run. Raises ConfigError where there is none."""
        found = cls(Path(folder))
        if not found.is_run:
            raise ConfigError([Problem(str(folder), f"is no run: it has no {CONFIG}", "give the output_dir of a run")])
        return found

    @property
    def is_run(self) -> bool:
        """True if a run has begun in this folder."""
        return (self.folder / CONFIG).is_file()

    @property
    def metrics(self) -> Metrics:
        """The rows that the run has written into metrics.jsonl so far."""
        return Metrics.read(self.folder / METRICS)

    @property
    def config(self) -> dict[str, Any]:
        """The whole config, as plain values. Raises ConfigError if it can't be read."""
        path = self.folder / CONFIG
        try:
            found = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise ConfigError([Problem(str(path), f"can't be read: {error}", "give the output_dir of a run")]) from error
        if not isinstance(found, dict):
            raise ConfigError([Problem(str(path), "is no config", "give the output_dir of a run")])
        return cast(dict[str, Any], found)

    @property
    def incidents(self) -> list[dict[str, Any]]:
        """Incidents of the run, oldest first (docs/resilience.md lists the kinds)."""
        return list(read_incidents(self.folder))

    @property
    def checkpoints(self) -> list[str]:
        """The complete checkpoints of the run, oldest first: folders, or URLs where `checkpoint.folder` is one."""
        from ..checkpoint.files import open_files
        from ..checkpoint.folder import steps_newest_first

        folder = str((self.config.get("checkpoint") or {}).get("folder") or self.folder / "checkpoints").rstrip("/")
        return [f"{folder}/{name}" for name in reversed(steps_newest_first(open_files(folder)))]

    def load(self) -> LoadedModel:
        """Load the model of the newest complete checkpoint (see `meshloom.load`). Raises ConfigError where there is none."""
        from .load import load

        folder = (self.config.get("checkpoint") or {}).get("folder")
        return load(self.folder if folder is None else folder)


def planned_length(config: Mapping[str, Any]) -> tuple[str, int] | None:
    """Return the unit (steps or tokens) and the number of them that a run is to take; None if its config does not say."""
    trainer = config.get("trainer") or {}
    for unit in ("steps", "tokens"):
        if isinstance(trainer.get(unit), int | float):
            return unit, int(trainer[unit])
    return None


def reached(metrics: Metrics) -> dict[str, int]:
    """Return the most that any row of a run has counted: steps, tokens and samples.

    Not of rows of steps alone: with logging.every the last step may have none, and older versions wrote other rows.
    """
    counters = {"steps": "step", "tokens": "tokens", "samples": "samples"}
    return {counter: max((row.get(name, 0) for row in metrics.rows), default=0) for counter, name in counters.items()}
