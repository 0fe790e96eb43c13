"""Measure the best candidates of `meshloom tune --measure N`: run them one after another, and rank them by speed."""

from __future__ import annotations

import contextlib
import math
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import psutil
from rich import box
from rich.console import Console
from rich.status import Status
from rich.table import Table
from rich.text import Text

from ..config.overrides import quoted
from ..config.problems import ConfigError, Problem
from ..config.words import counted
from ..models.costs import flops_per_token
from ..planner.tables import gib, right
from ..trainer.launching import gpu_count, run_processes
from ..trainer.schema import RunConfig, make_composer
from .exit_codes import BAD_CONFIG
from .run_metrics import steps_of
from .tune_search import Candidate, Tuned, described
from .typed_words import given_keys

WARM_UP = 3
"""Steps that are not counted: kernels are compiled and chosen, memory is found."""
TIMED = 5
MICRO_BATCHES = 4
"""A larger batch is cut short to so many of the largest micro-batches per rank; its steps would only repeat them."""
CPU_FLOPS = 3.6e14
"""Work that takes a CPU an hour, at 100 GFLOP/s."""
POLL_SECONDS = 0.2
GRACE_SECONDS = 60.0
END_SECONDS = 10.0
TAIL = 200_000  # bytes of a log that are searched for what went wrong
INSTEAD = {
    "resume": "none",
    "launch.max_restarts": "0",
    "launch.check": "false",
    "checkpoint.every": "0",
    "checkpoint.folder": "null",
    "logging.every": "1",
    "logging.progress": "false",
    "logging.wandb": "false",
    "logging.tensorboard": "false",
    "trainer.eval_every": "0",
    "trainer.sample_prompt": "null",
    "trainer.hooks": "[]",
}
"""Keys of a run that is measured: nothing is saved, sent or evaluated."""


@dataclass(frozen=True)
class Trial:
    """A measured candidate. speed: tokens/s of a process; memory: peak GiB of the first GPU; failure: why there are neither."""

    candidate: Candidate
    speed: float = 0.0
    memory: float | None = None
    failure: str = ""


def check(config: RunConfig) -> None:
    """Raises ConfigError for a run that this machine can't start, whatever its settings."""
    problems: list[Problem] = []
    if config.launch.most_nodes != 1:
        fix = "leave it out, or set launch.nodes=1 to tune for one node"
        problems.append(Problem("--measure", f"runs on this machine, not on launch.nodes={config.launch.nodes}", fix))
    gpus = gpu_count()
    count = run_processes(config.launch)
    if 0 < gpus < count:
        fix = f"start at most {gpus}, or leave --measure out"
        problems.append(Problem("launch.nproc", f"{counted(count, 'process')} for {counted(gpus, 'GPU')}", fix))
    if problems:
        raise ConfigError(problems)


def refuse_on_cpu(tuned: Tuned, candidates: Sequence[Candidate]) -> None:
    """Raises ConfigError where there is no GPU and the steps of a candidate would take a CPU more than an hour."""
    plan = candidates[0].plan
    tokens = (trial_samples(tuned.config, candidates) or plan.samples) * tuned.config.data.seq_len
    work = flops_per_token(plan.model.shape, tuned.config.data.seq_len) * tokens * (WARM_UP + TIMED)
    if gpu_count() == 0 and work > CPU_FLOPS:
        hours = work / CPU_FLOPS
        message = (
            f"there is no GPU here, and {WARM_UP + TIMED} steps of one candidate would take a CPU about {hours:,.0f} hours"
        )
        raise ConfigError([Problem("--measure", message, "leave it out, or run it on the machine that trains")])


def measure(
    tuned: Tuned, candidates: Sequence[Candidate], overrides: Sequence[str], config_dir: str | None, console: Console
) -> Candidate | None:
    """Run the candidates and report each. Return the fastest, None if none ran. Ctrl-C and SIGTERM end the run, and raise."""
    common, notes = common_overrides(tuned, candidates, overrides, config_dir)
    for note in notes:
        console.print(f"· {note}", style="dim", highlight=False, markup=False)
    trials: list[Trial] = []
    with _stops() as stops, tempfile.TemporaryDirectory(prefix="meshloom-tune-", ignore_cleanup_errors=True) as folder:
        for number, candidate in enumerate(candidates, 1):
            label = f"{number} of {len(candidates)}: {described(candidate.settings)}"
            switches = [f"--config-dir={config_dir}"] if config_dir else []
            command = [*switches, *common, *tuned.changes(candidate)]
            with console.status(label) as status:
                trial = _trial(candidate, command, Path(folder) / str(number), _Watch(label, status, stops))
            trials.append(trial)
            console.print(Text(f"{label}: {outcome(trial)}"))
    trials.sort(key=lambda trial: -trial.speed)
    console.print(_table(trials))
    return trials[0].candidate if trials[0].speed else None


def outcome(trial: Trial) -> str:
    """Describe in a few words how a candidate did."""
    held = "" if trial.memory is None else f", {trial.memory:.1f} GiB"
    return trial.failure or f"{trial.speed:,.0f} tokens/s per process{held}"


def common_overrides(
    tuned: Tuned, candidates: Sequence[Candidate], overrides: Sequence[str], config_dir: str | None
) -> tuple[list[str], list[str]]:
    """Return the overrides of all trials, and notes on them. What costs time beside training is switched off."""
    replaced = dict(INSTEAD)
    notes: list[str] = []
    samples = trial_samples(tuned.config, candidates)
    if samples is not None:
        replaced["batch.samples"] = str(samples)
        notes.append(f"measured with batch.samples={samples}, which has micro-batches enough to tell")
    kept = [word for word in overrides if not given_keys([word]) & {*replaced, "output_dir"}]
    words = [*kept, *(f"{key}={value}" for key, value in replaced.items())]
    vocabulary = candidates[0].plan.model.shape.known_vocabulary
    synthetic = [f"data.seq_len={tuned.config.data.seq_len}", f"data.vocabulary={vocabulary}", "data=synthetic"]
    without = [word for word in words if not any(key.partition(".")[0] == "data" for key in given_keys([word]))]
    try:
        composition = make_composer(config_dir).compose([*without, *synthetic])
        if not composition.problems and not composition.notices:
            return [*without, *synthetic], notes
    except ConfigError:
        pass
    notes.append("measured on the run's own data: its recipe sets keys that data=synthetic does not have")
    return words, notes


def trial_samples(config: RunConfig, candidates: Sequence[Candidate]) -> int | None:
    """Return a smaller global batch on which candidates compare as on the whole one; None to keep the whole one."""
    plan = candidates[0].plan
    if config.batch.name != "fixed" or isinstance(config.batch.samples, str) or plan.layout.pp > 1:
        return None
    unit = math.lcm(*(one.plan.job.micro for one in candidates)) * plan.layout.data_size * plan.islands
    return unit * MICRO_BATCHES if unit * MICRO_BATCHES < plan.samples else None


@dataclass(frozen=True)
class _Watch:
    """Settings by which a trial is watched. stops: signals that have asked for an end."""

    label: str
    status: Status
    stops: Sequence[int]


def _trial(candidate: Candidate, arguments: Sequence[str], folder: Path, watch: _Watch) -> Trial:
    """Run a candidate in a folder of its own. arguments: of `meshloom train`."""
    folder.mkdir()
    path, log = folder / "run" / "metrics.jsonl", folder / "log.txt"
    own = f"output_dir={quoted(str(folder / 'run'))}"
    command = [sys.executable, "-m", "meshloom.launch.cli", "train", *arguments, own]
    with log.open("wb") as output:
        # A session of its own: a terminal's Ctrl-C is for this process, which then ends the run.
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            _until_measured(child, path, watch)
        finally:
            end(child)
    rows = steps_of(path)
    if len(rows) < WARM_UP + TIMED and child.returncode != 0:
        with log.open("rb") as written:
            written.seek(max(0, log.stat().st_size - TAIL))
            return Trial(candidate, failure=reason(written.read().decode(errors="replace"), child.returncode))
    timed = rows[min(WARM_UP, len(rows) - 1) :] if rows else []
    if not timed:
        return Trial(candidate, failure="it ended before its first step")
    speed = statistics.median(row["tokens_per_second"] for row in timed) / candidate.plan.processes
    return Trial(candidate, speed, timed[-1].get("memory_gib"))


def _until_measured(child: subprocess.Popen[bytes], path: Path, watch: _Watch) -> None:
    """Wait for the steps that are wanted, or the run's end. A run that has taken them is asked to stop, as by a scheduler.

    Raises KeyboardInterrupt as soon as there are stops.
    """
    deadline = math.inf
    while child.poll() is None and time.monotonic() < deadline:
        if watch.stops:
            raise KeyboardInterrupt
        done = len(steps_of(path))
        watch.status.update(f"{watch.label}: step {done} of {WARM_UP + TIMED}")
        if done >= WARM_UP + TIMED and deadline == math.inf:
            child.terminate()
            deadline = time.monotonic() + GRACE_SECONDS
        time.sleep(POLL_SECONDS)


def end(child: subprocess.Popen[bytes]) -> None:
    """End a run and every process that it has started; nothing for one that has ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        if child.poll() is None:
            process = psutil.Process(child.pid)
            family = [*process.children(recursive=True), process]
            for member in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.terminate()
            _, alive = psutil.wait_procs(family, timeout=END_SECONDS)
            for member in alive:
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.kill()
    child.wait()


def reason(log: str, code: int) -> str:
    """Extract why a run failed from its output: the last error of a process, not the agent's summary of it."""
    memory = re.search(r"OutOfMemoryError: .*?(Tried to allocate [\d.]+ \w+)", log)
    if memory is not None:
        return f"out of memory ({memory[1][0].lower()}{memory[1][1:]})"
    lines = [re.sub(r"^\[?rank ?\d+\]?: ?", "", line.rstrip()) for line in log.splitlines()]
    refused = [line.strip(" -") for line in lines if line.startswith("  - ")]
    if code == BAD_CONFIG and refused:
        return f"refused: {refused[0]}"
    errors = [
        line for line in lines if re.match(r"(\w+\.)*\w+(Error|Exception|Diverged)\b", line) and "ChildFailed" not in line
    ]
    told = [*(line for line in lines if re.search(r"\w", line)), *errors]
    return f"failed with exit code {code}: {told[-1].strip()}" if told else f"failed with exit code {code}"


@contextlib.contextmanager
def _stops() -> Generator[Sequence[int]]:
    """Collect signals that ask for an end: SIGTERM, and Ctrl-C even if the parent process ignores it."""
    came: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        came.append(number)

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _table(trials: Sequence[Trial]) -> Table:
    columns = [right(name) for name in ("tokens/s per process", "predicted", "off by", "GiB", "planned GiB")]
    title = f"Measured: medians of {TIMED} steps after {WARM_UP}"
    table = Table("settings", *columns, "", title=title, title_justify="left", box=box.SIMPLE)
    for trial in trials:
        speed = f"{trial.speed:,.0f}" if trial.speed else "–"
        held = "–" if trial.memory is None else f"{trial.memory:.1f}"
        planned = gib(trial.candidate.bytes)
        predicted = f"{trial.candidate.speed:,.0f}"
        off = f"{trial.candidate.speed / trial.speed - 1:+.1%}" if trial.speed else "–"
        why = Text(trial.failure.partition(":")[0])
        table.add_row(described(trial.candidate.settings), speed, predicted, off, held, planned, why)
    return table
