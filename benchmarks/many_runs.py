"""Many runs of `meshloom train` in a few processes, one after another in each: what the comparisons of runs are made with.

A process that has trained once has its libraries loaded and its kernels compiled for the next run.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

FINISHED = "finished"
"""A file in the folder of a run that ended well: how many seconds it took."""


def run_all(shares: Sequence[Sequence[Sequence[str]]], folder: Path, seconds: float | None = None) -> None:
    """Start a process for each share, a list of command lines behind `meshloom train`, and wait for all.

    A line's last argument is its output_dir; lines whose run has finished are left out. Output: work-<number>.log in `folder`.
    seconds: what is still running after so many is ended.
    """
    end = None if seconds is None else time.monotonic() + seconds
    folder.mkdir(parents=True, exist_ok=True)
    started: list[subprocess.Popen[bytes]] = []
    for number, share in enumerate(shares):
        path = folder / f"work-{number}.json"
        path.write_text(json.dumps([list(line) for line in share if not (output(line) / FINISHED).exists()]))
        with (folder / f"work-{number}.log").open("w") as log:
            started.append(subprocess.Popen([sys.executable, __file__, str(path)], stdout=log, stderr=log))
    for process in started:
        try:
            process.wait(None if end is None else max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()  # asked kindly it would call the run finished
            process.wait()


def output(line: Sequence[str]) -> Path:
    """The folder of a command line's run."""
    key, _, folder = line[-1].partition("=")
    assert key == "output_dir"
    return Path(folder)


def work(path: Path) -> None:
    """One process: its command lines, one after another. A run that fails does not keep the others from their turn."""
    for line in json.loads(path.read_text()):
        run(line)


def run(line: Sequence[str]) -> bool:
    """Train in this process as a command line says. Return whether the run ended well."""
    from meshloom.launch.train import main as train

    began = time.perf_counter()
    try:
        code = train(line)
    except Exception:
        traceback.print_exc()
        code = 1
    if code == 0:
        (output(line) / FINISHED).write_text(f"{time.perf_counter() - began:.1f} s\n")
    print(f"{output(line).name}: exit code {code}, {time.perf_counter() - began:.1f} s", flush=True)
    release()
    return code == 0


def release() -> None:
    """Let go of a run's memory: what was compiled holds its model, and counts towards the compiler's limit of variants."""
    import torch

    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    work(Path(sys.argv[1]))
