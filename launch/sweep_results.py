"""Tell how far the runs of a sweep have come: `python -m meshloom.launch.sweep_results <folder>`, at the end of each job."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..config.problems import ConfigError
from ..trainer.identity import METRICS
from .ranking import Standing, ranked
from .run_folder import Run, planned_length, reached
from .run_metrics import Metrics, last_numbers, shown_numbers


def main(argv: Sequence[str]) -> int:
    """Print a row for each run in each folder, the best first. Return 0."""
    for folder in map(Path, argv):
        print(f"runs of the sweep in {folder}:")
        print("\n".join(f"  {row}" for row in rows(folder)))
    return 0


def rows(folder: Path) -> list[str]:
    """Return the name and last numbers of each run, the best first: see `ranked`. One below its length says so."""
    found: list[tuple[str, dict[str, float], str]] = []
    for run in (Run(path.parent) for path in sorted(folder.glob(f"*/{METRICS}"))):
        metrics = run.metrics  # read once
        found.append((run.folder.name, last_numbers(metrics), _left(run, metrics)))
    best_first = ranked([_standing(numbers, left) for _, numbers, left in found])
    return [
        "  ".join(filter(None, [name, *shown_numbers(numbers), left]))
        for name, numbers, left in (found[at] for at in best_first)
    ]


def _left(run: Run, metrics: Metrics) -> str:
    """Return how long a run is to be that has not reached its length; "" if it has, or if its folder does not tell."""
    try:
        length = planned_length(run.config)
    except ConfigError:
        return ""
    return "" if length is None or reached(metrics)[length[0]] >= length[1] else f"of {length[1]:,} {length[0]}"


def _standing(numbers: Mapping[str, float], left: str) -> Standing:
    if math.isnan(numbers.get("loss", 0.0)):  # diverged
        return Standing(None, None, not left)
    return Standing(numbers.get("loss"), numbers.get("eval_loss"), not left)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
