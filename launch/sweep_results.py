"""Tell how far the runs of a sweep have come: `python -m meshloom.launch.sweep_results <folder>`, at the end of each job."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..trainer.identity import METRICS
from .ranking import Standing, ranked
from .run_metrics import last_numbers, shown_numbers


def main(argv: Sequence[str]) -> int:
    """Print a row for each run in each folder, the best first. Return 0."""
    for folder in map(Path, argv):
        print(f"runs of the sweep in {folder}:")
        print("\n".join(f"  {row}" for row in rows(folder)))
    return 0


def rows(folder: Path) -> list[str]:
    """Return the name and last numbers of each run, the best first: see `ranked`. How long a run is to be is not read."""
    found = [(path.parent.name, last_numbers(path)) for path in sorted(folder.glob(f"*/{METRICS}"))]
    best_first = ranked([_standing(numbers) for _, numbers in found])
    return ["  ".join([name, *shown_numbers(numbers)]) for name, numbers in (found[at] for at in best_first)]


def _standing(numbers: Mapping[str, float]) -> Standing:
    if math.isnan(numbers.get("loss", 0.0)):  # diverged
        return Standing(None, None)
    return Standing(numbers.get("loss"), numbers.get("eval_loss"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
