"""Compare the loss curves of two runs: how far apart they are, step by step, and a picture.

python benchmarks/compare_runs.py outputs/one outputs/four --draw curves.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def curve(run: Path, key: str) -> dict[int, float]:
    """Step → number, of the rows of metrics.jsonl that have the key."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row[key] for row in rows if key in row}


def main() -> None:
    """Print the comparison; draw it where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs=2)
    parser.add_argument("--draw", type=Path)
    arguments = parser.parse_args()
    first, second = arguments.runs
    for key in ("loss", "eval_loss"):
        one, other = curve(first, key), curve(second, key)
        common = sorted(one.keys() & other.keys())
        if not common:
            raise SystemExit(f"{first} and {second} have no step with {key} in common")
        apart = {step: abs(one[step] - other[step]) / abs(one[step]) for step in common}
        last = common[-1]
        print(
            f"{key}: {len(common)} steps in common; at step {last}: {one[last]:.6f} and {other[last]:.6f}; relative difference "
            f"over the first 10: {max(apart[step] for step in common[:10]):.1e}, over all: {max(apart.values()):.1e}"
        )
    if arguments.draw is not None:
        from matplotlib import pyplot

        figure, (above, below) = pyplot.subplots(2, 1, sharex=True, figsize=(8, 6), height_ratios=(3, 1))
        one, other = curve(first, "loss"), curve(second, "loss")
        common = sorted(one.keys() & other.keys())
        above.plot(common, [one[step] for step in common], label=str(first), linewidth=3, alpha=0.4)
        above.plot(common, [other[step] for step in common], label=str(second), linewidth=1)
        above.set_ylabel("loss")
        above.legend()
        below.semilogy(common, [max(abs(one[step] - other[step]) / abs(one[step]), 1e-17) for step in common])
        below.set_ylabel("relative difference")
        below.set_xlabel("step")
        figure.tight_layout()
        figure.savefig(arguments.draw, dpi=120)


if __name__ == "__main__":
    main()
