"""Compare two checkouts to the bit: the losses and gradient norms of every step of a run of each.

    python benchmarks/same_losses.py ../meshloom-before . recipe=quickstart trainer.steps=10 launch.nproc=1

The words behind the checkouts are those of `meshloom train`; evaluation, samples and checkpoints are off unless they say
otherwise. Both runs happen on this machine, one after the other. The exit code is 1 where a number differs.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from compare_runs import curve

QUIET = ["trainer.eval_every=0", "trainer.sample_prompt=null", "checkpoint.every=0", "logging.progress=false"]


def run(checkout: Path, folder: Path, words: Sequence[str]) -> None:
    """One run of `meshloom train` with the code of a checkout."""
    folder.mkdir()
    (folder / "meshloom").symlink_to(checkout.resolve())  # the root of a checkout is the package
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    command = [sys.executable, "-m", "meshloom.launch.cli", "train", *QUIET, *words, f"output_dir={folder / 'run'}"]
    subprocess.run(command, env=environment, cwd=folder, check=True)


def main(arguments: Sequence[str]) -> int:
    """Print the comparison."""
    if len(arguments) < 2:
        print(__doc__, file=sys.stderr)
        return 2
    checkouts, words = [Path(written) for written in arguments[:2]], arguments[2:]
    with tempfile.TemporaryDirectory() as scratch:
        folders = [Path(scratch) / name for name in ("first", "second")]
        for checkout, folder in zip(checkouts, folders, strict=True):
            run(checkout, folder, words)
        alike = True
        for key in ("loss", "grad_norm"):
            one, other = (curve(folder / "run", key) for folder in folders)
            differ = [step for step in sorted(one.keys() | other.keys()) if one.get(step) != other.get(step)]
            alike &= not differ
            if differ:
                first = differ[0]
                print(f"{key}: {len(differ)} of {len(one)} steps differ; step {first}: {one.get(first)}, {other.get(first)}")
            else:
                print(f"{key}: equal to the bit over {len(one)} steps")
    return 0 if alike else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
