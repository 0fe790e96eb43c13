"""Tell how far the runs of a sweep have come: `python -m meshloom.launch.sweep_results <folder>`, at the end of each job."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path

from ..trainer.identity import METRICS
from .run_metrics import last_numbers, shown_numbers


def main(argv: Sequence[str]) -> int:
    """Print a row for each run in each folder, the best first. Return 0."""
    for folder in map(Path, argv):
        print(f"runs of the sweep in {folder}:")
        print("\n".join(f"  {row}" for row in rows(folder)))
    return 0


def rows(folder: Path) -> list[str]:
    """Return the name and last numbers of each run, the lowest validation loss (or loss, where there is none) first.

    Runs that have diverged, and those without a loss, come last.
    """
    found = {path.parent.name: last_numbers(path) for path in folder.glob(f"*/{METRICS}")}

    def rank(name: str) -> tuple[float, str]:
        numbers = found[name]
        diverged = math.isnan(numbers.get("loss", 0.0))
        return math.inf if diverged else numbers.get("eval_loss", numbers.get("loss", math.inf)), name

    return ["  ".join([name, *shown_numbers(found[name])]) for name in sorted(found, key=rank)]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
