"""Compare the loss curves of runs with that of the first: how far apart they are, step by step, and a picture.

python benchmarks/compare_runs.py outputs/one outputs/four --draw curves.png
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path


def curve(run: Path, key: str) -> dict[int, float]:
    """Step → number, of the rows of metrics.jsonl that have the key."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row[key] for row in rows if key in row}


def compare(first: Path, second: Path) -> None:
    """Print how far apart two runs are. Ends the program where they have no step in common."""
    for key in ("loss", "eval_loss"):
        one, other = curve(first, key), curve(second, key)
        common = sorted(one.keys() & other.keys())
        if key == "eval_loss" and not one and not other:
            continue
        if not common:
            raise SystemExit(f"{first} and {second} have no step with {key} in common")
        apart = {step: abs(one[step] - other[step]) / abs(one[step]) for step in common}
        last = common[-1]
        print(
            f"{key}: {len(common)} steps in common; at step {last}: {one[last]:.6f} and {other[last]:.6f}; relative difference "
            f"over the first 10: {max(apart[step] for step in common[:10]):.1e}, over all: {max(apart.values()):.1e}"
        )


def draw(runs: Sequence[Path], file: Path) -> None:
    """Draw the losses of all, and below the differences from the first."""
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, 1, sharex=True, figsize=(8, 6), height_ratios=(3, 1))
    one = curve(runs[0], "loss")
    above.plot(sorted(one), [one[step] for step in sorted(one)], label=str(runs[0]), linewidth=3, alpha=0.4)
    for run in runs[1:]:
        other = curve(run, "loss")
        common = sorted(one.keys() & other.keys())
        (line,) = above.plot(common, [other[step] for step in common], label=str(run), linewidth=1)
        apart = [max(abs(one[step] - other[step]) / abs(one[step]), 1e-17) for step in common]
        below.semilogy(common, apart, color=line.get_color())
    above.set_ylabel("loss")
    above.legend()
    below.set_ylabel("relative difference")
    below.set_xlabel("step")
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def main() -> None:
    """Print the comparisons; draw them where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", type=Path)
    parser.add_argument("others", type=Path, nargs="+")
    parser.add_argument("--draw", type=Path)
    arguments = parser.parse_args()
    for other in arguments.others:
        compare(arguments.first, other)
    if arguments.draw is not None:
        draw([arguments.first, *arguments.others], arguments.draw)


if __name__ == "__main__":
    main()
