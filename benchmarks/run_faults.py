"""Faults in whole runs: stop, kill, slow down or fail a rank, kill the launcher; see what the run says, and when.

    python benchmarks/run_faults.py                          every fault once, 3 processes on CPU, a markdown table
    python benchmarks/run_faults.py stop --ranks 2 --times 5 --layout parallel.zero=3
    python benchmarks/run_faults.py --random 200 --seed 1    so many faults drawn at random

A fault is timed by the ranks' own heartbeats: a rank is stopped when it is seen in the phase, and the stop counts if it still
is in it afterwards. A row is wrong if another rank is named, or none.
"""

# pyright: basic, reportMissingImports=false

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from meshloom.parallel.heartbeat import Phase, read_beat
from meshloom.trainer.watch.folder import WATCH_FOLDER, AttemptFolder
from meshloom.trainer.watch.incidents import read_incidents

PHASES = ["data", "forward", "backward", "exchange", "update", "save", "evaluation", "hooks"]
FAULTS = ["stop", "kill", "raise", "slow", "launcher", "silent"]
RECIPE = [
    "recipe=quickstart", "data=synthetic", "data.vocabulary=61", "data.seq_len=32", "data.validation_samples=12",
    "model.dim=32", "model.layers=2", "model.heads=2", "model.kv_heads=1", "model.ffn_dim=64", "precision=fp64",
    "batch.samples=12", "batch.micro=2", "trainer.tokens=null", "trainer.steps=100000", "trainer.eval_every=5",
    "trainer.eval_samples=12", "checkpoint.every=5", "checkpoint.mode=sync", "checkpoint.keep=2",
    "trainer.sample_prompt=null", "logging.progress=false",
]  # fmt: skip
HOOK = '''
import os, time
from meshloom.trainer.hooks.base import Hook

class Fault(Hook):
    """Does something bad on one rank from a step on."""
    def __init__(self, rank, step, what, seconds=0.0):
        self.rank, self.step, self.what, self.seconds = rank, step, what, seconds
    def on_step_begin(self, loop):
        if loop.mesh.rank != self.rank or loop.progress.step < self.step:
            return
        if self.what == "raise":
            raise ValueError("the fault injector says so")
        time.sleep(self.seconds)
'''
FIRST_STEPS = 4
PATIENCE = 120.0


@dataclass
class Outcome:
    """Outcome of one fault. noticed: seconds to the first line that names the rank; ended: to the end of all processes."""

    fault: str
    phase: str
    rank: int
    message: str = ""
    noticed: float | None = None
    ended: float | None = None
    code: int | None = None
    step_seconds: float = 0.0
    named: int | None = None
    lost: int = 0
    orphans: int = 0
    lines: list[str] = field(default_factory=list)


class Trial:
    """One run in a folder of its own."""

    def __init__(self, ranks: int, layout: list[str], more: list[str], folder: Path) -> None:
        (folder / "injected.py").write_text(HOOK)
        self.ranks, self.out = ranks, folder / "run"
        words = [*RECIPE, *layout, f"launch.nproc={ranks}", "launch.max_restarts=0", *more, f"output_dir={self.out}"]
        variables = {**os.environ, "PYTHONPATH": f"{folder}:{os.environ.get('PYTHONPATH', '')}", "TMPDIR": str(folder)}
        command = [sys.executable, "-m", "meshloom.launch.cli", "train", *words]
        self.process = subprocess.Popen(command, env=variables, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        self.lines: list[tuple[float, str]] = []
        threading.Thread(target=self._read, daemon=True).start()
        self.attempt = self._started()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append((time.monotonic(), line.rstrip()))

    def _started(self) -> AttemptFolder:
        """Wait until every rank has done some steps."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline and self.process.poll() is None:
            if (root := self._watched()) is not None and (attempt := AttemptFolder.newest(root)) is not None:
                beats = [read_beat(attempt.beat(rank)) for rank in range(self.ranks)]
                if all(beat is not None and beat.steps_done >= FIRST_STEPS for beat in beats):
                    return attempt
            time.sleep(0.05)
        raise SystemExit("the run did not start:\n" + "\n".join(line for _, line in self.lines))

    def _watched(self) -> Path | None:
        """Return the watch folder of this run's agent."""
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process(self.process.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if (found := child.environ().get(WATCH_FOLDER)) is not None:
                        return Path(found)
                # The agent sets it for its children only after it was started: look into its memory-backed folders.
                for place in (Path("/dev/shm"), Path(tempfile.gettempdir())):
                    for folder in place.glob("meshloom-watch-*"):
                        attempt = AttemptFolder.newest(folder)
                        beat = None if attempt is None else read_beat(attempt.beat(0))
                        if beat is not None and beat.pid in {
                            each.pid for each in psutil.Process(self.process.pid).children(recursive=True)
                        }:
                            return folder
        return None

    def pid(self, rank: int) -> int:
        """Return the process of a rank."""
        beat = read_beat(self.attempt.beat(rank))
        assert beat is not None
        return beat.pid

    def step_seconds(self) -> float:
        """Return the usual time of a step."""
        found = [beat.step_usual for rank in range(self.ranks) if (beat := read_beat(self.attempt.beat(rank))) is not None]
        return max([seconds for seconds in found if seconds is not None], default=0.0)

    def stop_in(self, rank: int, phase: Phase, number: int) -> bool:
        """Send a signal to a rank while it is in a phase. Return whether it was caught there."""
        deadline, file, pid = time.monotonic() + PATIENCE / 2, self.attempt.beat(rank), self.pid(rank)
        while time.monotonic() < deadline and self.process.poll() is None:
            beat = read_beat(file)
            if beat is None or beat.phase is not phase:
                continue
            os.kill(pid, signal.SIGSTOP)
            time.sleep(0.005)
            after = read_beat(file)
            if after is not None and after.phase is phase:
                if number != signal.SIGSTOP:
                    os.kill(pid, number)
                    os.kill(pid, signal.SIGCONT)
                return True
            os.kill(pid, signal.SIGCONT)
            time.sleep(0.003)
        return False

    def end(self) -> None:
        """End whatever is left of the run."""
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process(self.process.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    child.kill()
        self.process.kill()
        self.process.wait()


def try_fault(fault: str, phase: str, rank: int, ranks: int, layout: list[str]) -> Outcome:
    """Run, inject a fault, and report."""
    found = Outcome(fault, phase, rank)
    more: list[str] = []
    if fault in ("raise", "slow", "silent"):
        seconds = {"raise": 0, "slow": 0.3, "silent": 3600}[fault]
        more = [f"trainer.hooks=[{{_target_: injected.Fault, rank: {rank}, step: 12, what: {fault}, seconds: {seconds}}}]"]
    with tempfile.TemporaryDirectory() as name:
        trial = Trial(ranks, layout, more, Path(name))
        try:
            began = _inject(trial, found)
            _observe(trial, found, began)
        finally:
            trial.end()
    return found


def _inject(trial: Trial, found: Outcome) -> float:
    """Inject the fault of an outcome; return when."""
    found.step_seconds = trial.step_seconds()
    if found.fault == "launcher":
        trial.process.kill()
    elif found.fault in ("stop", "kill"):
        number = signal.SIGSTOP if found.fault == "stop" else signal.SIGKILL
        if not trial.stop_in(found.rank, Phase[found.phase.upper()], number):
            raise SystemExit(f"rank {found.rank} was not caught in {found.phase}")
    else:
        while (beat := read_beat(trial.attempt.beat(found.rank))) is not None and beat.step < 13:
            time.sleep(0.005)
    return time.monotonic()


def _observe(trial: Trial, found: Outcome, began: float) -> None:
    """Wait for the end of the run, or of the ranks, and note what was said and when."""
    pids = [trial.pid(rank) for rank in range(trial.ranks)]
    deadline = began + PATIENCE
    while time.monotonic() < deadline and (trial.process.poll() is None or any(map(_alive, pids))):
        time.sleep(0.02)
        if found.fault == "slow" and any("slow" in line for _, line in trial.lines):
            break
    found.ended = time.monotonic() - began
    found.orphans = sum(map(_alive, pids))
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            if found.fault == "launcher":
                os.kill(pid, signal.SIGKILL)
    time.sleep(0.1)
    found.code = trial.process.poll()
    found.lines = [line for when, line in trial.lines if when >= began - 0.5]
    for when, line in trial.lines:
        if (told := re.search(r"rank (\d+)(?: \(|:| is slow)", line)) and when >= began - 0.05:
            found.noticed, found.message, found.named = when - began, line, int(told[1])
            break
    steps = [row["step"] for row in read_incidents(trial.out) if row["step"]]
    saved = [int(path.name.rpartition("-")[2]) for path in (trial.out / "checkpoints").glob("step-*")]
    found.lost = max(0, max(steps, default=0) - max(saved, default=0))


def _alive(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def schedules(arguments: argparse.Namespace) -> Iterator[tuple[str, str, int]]:
    """Yield the faults to try: what, in which phase, on which rank."""
    if arguments.random:
        draw = random.Random(arguments.seed)
        for _ in range(arguments.random):
            fault = draw.choice(arguments.faults)
            yield fault, draw.choice(arguments.phases) if fault in ("stop", "kill") else "", draw.randrange(arguments.ranks)
        return
    for fault, turn in itertools.product(arguments.faults, range(arguments.times)):
        for number, phase in enumerate(arguments.phases if fault in ("stop", "kill") else [""]):
            yield fault, phase, (number + turn + 1) % arguments.ranks


def main() -> None:
    """Try the faults that were asked for, and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("faults", nargs="*", default=FAULTS, help=", ".join(FAULTS))
    parser.add_argument("--phases", nargs="*", default=PHASES)
    parser.add_argument("--ranks", type=int, default=3)
    parser.add_argument("--times", type=int, default=1)
    parser.add_argument("--random", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layout", nargs="*", default=[])
    parser.add_argument("--verbose", action="store_true")
    arguments = parser.parse_args()
    print("| Fault | Rank | Noticed after | Ended after | Exit code | Steps lost | Message |")
    print("|---|---|---|---|---|---|---|")
    wrong = late = 0
    for fault, phase, rank in schedules(arguments):
        found = try_fault(fault, phase, rank, arguments.ranks, arguments.layout)
        bad = fault != "launcher" and found.named != rank
        wrong += bad
        late += fault == "stop" and (found.ended is None or found.ended > 3 * found.step_seconds + 5)
        noticed = "–" if found.noticed is None else f"{found.noticed:.1f} s"
        what = f"{fault} in {phase}" if phase else fault
        orphans = f" ({found.orphans} left)" if found.orphans and fault != "slow" else ""
        code = "" if found.code is None else found.code
        print(
            f"| {what} | {rank}{' WRONG' if bad else ''} | {noticed} | {found.ended:.1f} s{orphans} | {code} | {found.lost} |"
            f" {found.message} |",
            flush=True,
        )
        if arguments.verbose or bad:
            print("\n".join(found.lines), file=sys.stderr)
    print(f"\n{wrong} wrong or missing names; {late} of the stops ended later than 3 steps + 5 s", flush=True)
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
