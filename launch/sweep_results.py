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
from .run_metrics import last_numbers, shown_numbers


def main(argv: Sequence[str]) -> int:
    """Print a row for each run in each folder, the best first. Return 0."""
    for folder in map(Path, argv):
        print(f"runs of the sweep in {folder}:")
        print("\n".join(f"  {row}" for row in rows(folder)))
    return 0


def rows(folder: Path) -> list[str]:
    """Return the name and last numbers of each run, the best first: see `ranked`. One below its length says so."""
    found = [(path.parent, last_numbers(path)) for path in sorted(folder.glob(f"*/{METRICS}"))]
    left = [_left(run) for run, _ in found]
    best_first = ranked([_standing(numbers, missing) for (_, numbers), missing in zip(found, left, strict=True)])
    return ["  ".join(filter(None, [found[at][0].name, *shown_numbers(found[at][1]), left[at]])) for at in best_first]


def _left(folder: Path) -> str:
    """Return how long a run is to be that has not reached its length; "" if it has, or if its folder does not tell."""
    run = Run(folder)
    try:
        length = planned_length(run.config)
    except ConfigError:
        return ""
    return "" if length is None or reached(run.metrics)[length[0]] >= length[1] else f"of {length[1]:,} {length[0]}"


def _standing(numbers: Mapping[str, float], left: str) -> Standing:
    if math.isnan(numbers.get("loss", 0.0)):  # diverged
        return Standing(None, None, not left)
    return Standing(numbers.get("loss"), numbers.get("eval_loss"), not left)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
