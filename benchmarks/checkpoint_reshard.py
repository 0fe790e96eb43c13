"""The reshard matrix: random pairs of layouts on up to 8 processes, saved on one, loaded and saved on the other, and back.

    python benchmarks/checkpoint_reshard.py [--pairs 60] [--seed 0] [--together 6]

Every named array must have the same bits after A → B → A (read by the second reader of docs/), and the losses on each must
go on as those of a bare PyTorch loop do, to 1e-9 in fp64. Prints one row a pair; exit code 1 if any fails.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from support.checkpoint_layouts import draw_pairs, matrix


def main() -> int:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--together", type=int, default=6, help="pairs that share their processes")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    start, failed, worst = time.perf_counter(), 0, 0.0
    pairs = draw_pairs(arguments.seed, arguments.pairs)
    print("| from | to and back | difference of losses | |\n|---|---|---:|---|")
    for at in range(0, len(pairs), arguments.together):
        with tempfile.TemporaryDirectory() as folder:
            for result in matrix(pairs[at : at + arguments.together], Path(folder), timeout=600.0):
                fault = result.fault()
                failed += fault is not None
                worst = max(worst, result.difference)
                print(
                    f"| {result.pair.here} | {result.pair.there} | {result.difference:.0e} | {fault or 'same bits'} |",
                    flush=True,
                )
    print(f"\n{len(pairs)} pairs, {failed} failed, losses within {worst:.1e}, {time.perf_counter() - start:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
