"""Meshloom and torchtitan in turns on the same machine: one row of the table in docs/performance.md.

    python benchmarks/beside_torchtitan.py model=1B batch=4 rounds=3
    python benchmarks/beside_torchtitan.py model=3B batch=2 theirs="--activation_checkpoint.mode selective"
    python benchmarks/beside_torchtitan.py model=8B batch=2 gpus=2 ours="trainer.float8=tensorwise" theirs="…" logs=folder

Each is run as its users run it: `meshloom train` with the model's recipe, torchtitan's trainer, logging every step or fourth.
`ours` are more overrides, `theirs` more arguments of torchtitan; both take `batch` sequences of 8,192 random tokens per GPU
and step, with one setting of PyTorch's allocator (torchtitan's own start script has this one). The first run of each system
starts with an empty compile cache, which the later ones find filled. Prints a row per run as JSON (rate; GiB that tensors
take and that the allocator holds, at most; seconds from the start of the command to the first loss, ours once the second step
is under way, when we read it; the median clock and power of the busiest GPU) and the table's row at the end. With `profile=1`
our last run takes two steps more, which are not timed, and leaves a table of the last one's kernels in `logs`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from arguments import read

HERE = Path(__file__).parent
WARM_UP = 4  # steps; torchtitan's first averages hold compilation
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
TITAN_STEP = re.compile(r"step:\s*(\d+).*?loss:\s*([\d.]+).*?tps:\s*([\d,]+)")
TITAN_PEAKS = re.compile(r"peaks: allocated ([\d.]+) GiB, reserved ([\d.]+) GiB")


@dataclasses.dataclass
class Settings:
    """One comparison."""

    model: str = "1B"
    batch: int = 4
    gpus: int = 1
    rounds: int = 3
    steps: int = 24
    ours: str = ""
    theirs: str = "--activation_checkpoint.mode none"
    allocator: str = "expandable_segments:True"
    logs: str = ""
    profile: int = 0


@dataclasses.dataclass
class Measured:
    """One run. tokens/s/GPU: median, least and most; GiB of tensors, and of the allocator, at the peak; seconds to the first
    loss; MHz and W while it ran."""

    system: str
    rate: float
    least: float
    most: float
    allocated: float
    reserved: float
    first_step: float
    first_loss: float
    clock: float | None = None
    power: float | None = None


class Watch:
    """Clock and power of the GPUs that are used, from nvidia-smi, while a run goes on; idle moments are left out."""

    def __init__(self) -> None:
        query = "--query-gpu=clocks.sm,power.draw,utilization.gpu"
        command = ["nvidia-smi", query, "--format=csv,noheader,nounits", "-lms", "250"]
        if "CUDA_VISIBLE_DEVICES" in os.environ:
            command += ["-i", os.environ["CUDA_VISIBLE_DEVICES"]]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)

    def stop(self) -> tuple[float | None, float | None]:
        """Median clock (MHz) and power (W) of busy moments; None where nvidia-smi has nothing to say."""
        self._process.terminate()
        text, _ = self._process.communicate()
        busy: list[tuple[float, float]] = []
        for line in text.splitlines():
            try:
                clock, power, use = (float(field) for field in line.split(","))
            except ValueError:  # the line it was stopped in, or a field that this GPU does not report
                continue
            if use > 90:
                busy.append((clock, power))
        if not busy:
            return None, None
        return statistics.median(clock for clock, _ in busy), statistics.median(power for _, power in busy)


def run(system: str, settings: Settings, number: int, cache: Path) -> Measured:
    """One run of one system, in processes of its own. cache: the folder of what either system compiles."""
    output = cache / f"run-{number}"
    environment = {
        **os.environ,
        "TORCHINDUCTOR_CACHE_DIR": str(cache / system / "inductor"),
        "TRITON_CACHE_DIR": str(cache / system / "triton"),
        "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR": str(cache / system / "flash"),
        "QUACK_CACHE_DIR": str(cache / system / "quack"),
        "MESHLOOM_CACHE": str(cache / system / "meshloom"),
        "PYTORCH_ALLOC_CONF": settings.allocator,
        "PYTHONUNBUFFERED": "1",
    }
    profiled = bool(settings.profile) and number == settings.rounds - 1
    command = our_command(settings, output, profiled=profiled) if system == "meshloom" else their_command(settings)
    watch, began = Watch(), time.perf_counter()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    first = FirstRow(output / "metrics.jsonl", began)
    lines = [(time.perf_counter() - began, COLOUR.sub("", line)) for line in process.stdout]
    code = process.wait()
    first.stop()
    clock, power = watch.stop()
    text = "".join(f"{seconds:8.2f} {line}" for seconds, line in lines)
    if settings.logs:
        Path(settings.logs).mkdir(parents=True, exist_ok=True)
        Path(settings.logs, f"{system}-{number}.log").write_text(f"{shlex.join(command)}\n{text}")
    if code:
        raise SystemExit(f"{shlex.join(command)} ended with code {code}:\n{text[-4000:]}")
    if system == "torchtitan":
        measured = read_theirs(lines)
    else:
        measured = read_ours(output / "metrics.jsonl", first.seconds, settings)
        for table in output.glob("profile/*.txt"):
            shutil.copy(table, Path(settings.logs, f"profile-{settings.model}.txt"))
    measured.clock, measured.power = clock, power
    return measured


class FirstRow:
    """Wait for the first row of a file of metrics; its time is in seconds since `began`."""

    def __init__(self, path: Path, began: float) -> None:
        self.seconds = math.nan
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, args=(path, began))
        self._thread.start()

    def _look(self, path: Path, began: float) -> None:
        while not self._ended.wait(0.02):
            if path.exists() and path.stat().st_size:
                self.seconds = time.perf_counter() - began
                return

    def stop(self) -> None:
        """Look no longer."""
        self._ended.set()
        self._thread.join()


def our_command(settings: Settings, output: Path, *, profiled: bool) -> list[str]:
    """Of `meshloom train`: a recipe on random tokens, which saves and evaluates nothing. profiled: two steps more."""
    steps = settings.steps + WARM_UP + 2 * profiled
    work = [f"recipe=llama_{settings.model.lower()}", "data=synthetic", "data.seq_len=8192", f"launch.nproc={settings.gpus}"]
    batch = [f"batch.samples={settings.batch * settings.gpus}", f"batch.micro={settings.batch}"]
    length = ["trainer.tokens=null", f"trainer.steps={steps}", "schedule.warmup=2"]
    without = ["trainer.eval_every=0", "checkpoint.every=0", "logging.progress=false", f"output_dir={output}"]
    profile = [f"trainer.profile_step={steps}"] if profiled else []
    words = [*work, *batch, *length, *without, *profile, *shlex.split(settings.ours)]
    return [sys.executable, "-m", "meshloom.launch.cli", "train", *words]


def their_command(settings: Settings) -> list[str]:
    """Of torchtitan, as many timed steps as ours."""
    launcher = ["torchrun", "--standalone", "--nproc-per-node", str(settings.gpus)]
    steps = ["--training.steps", str(settings.steps + WARM_UP), "--metrics.log_freq", "4"]
    shape = ["--model.flavor", settings.model, "--training.local_batch_size", str(settings.batch)]
    fixed = ["--training.seq_len", "8192", "--compile.enable"]
    return [*launcher, str(HERE / "torchtitan_synthetic.py"), *steps, *shape, *fixed, *shlex.split(settings.theirs)]


def read_ours(path: Path, first_step: float, settings: Settings) -> Measured:
    """From the run's metrics."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows = rows[: settings.steps + WARM_UP]
    rates = [row["tokens_per_second"] / settings.gpus for row in rows[WARM_UP:]]
    allocated, reserved = (rows[-1].get(key, math.nan) for key in ("memory_gib", "memory_reserved_gib"))
    return Measured(
        "meshloom", statistics.median(rates), min(rates), max(rates), allocated, reserved, first_step, rows[0]["loss"]
    )


def read_theirs(lines: Sequence[tuple[float, str]]) -> Measured:
    """From torchtitan's log: its averages over 4 steps, those of the warm-up left out."""
    found = [(seconds, match) for seconds, line in lines if (match := TITAN_STEP.search(line))]
    rates = [float(match[3].replace(",", "")) for _, match in found if int(match[1]) > WARM_UP]
    peaks = next(match for _, line in lines if (match := TITAN_PEAKS.search(line)))
    first_seconds, first = found[0]
    memory = float(peaks[1]), float(peaks[2])
    return Measured("torchtitan", statistics.median(rates), min(rates), max(rates), *memory, first_seconds, float(first[2]))


def row(settings: Settings, results: Sequence[Measured]) -> str:
    """Medians over the rounds, with the least and the most of any; the first loss is the first run's, with a cold cache."""

    def cell(system: str) -> tuple[str, Measured]:
        mine = [result for result in results if result.system == system]
        fields = ("rate", "allocated", "reserved")
        rate, allocated, reserved = (statistics.median(getattr(each, field) for each in mine) for field in fields)
        least, most = min(each.least for each in mine), max(each.most for each in mine)
        whole = Measured(system, rate, least, most, allocated, reserved, mine[0].first_step, mine[0].first_loss)
        memory = f"{allocated:.1f} GiB of tensors, {reserved:.1f} held"
        return f"{rate:,.0f} ({least:,.0f}–{most:,.0f}), {memory}, first loss after {whole.first_step:.1f} s", whole

    theirs, titan = cell("torchtitan")
    ours, own = cell("meshloom")
    work = f"{settings.model}, {settings.gpus} GPU, {settings.batch} × 8,192"
    memory = f"{own.allocated / titan.allocated:.3f} × tensors, {own.reserved / titan.reserved:.3f} × held"
    start = f"{own.first_step / titan.first_step:.2f} × first loss"
    return f"| {work} | {theirs} | {ours} | {own.rate / titan.rate:.3f} × rate, {memory}, {start} |"


def main() -> None:
    """Run both in turns and print."""
    settings = read(Settings(), sys.argv[1:])
    results: list[Measured] = []
    with tempfile.TemporaryDirectory() as cache:
        for number in range(settings.rounds):
            for system in ("torchtitan", "meshloom"):
                results.append(run(system, settings, number, Path(cache)))
                print(json.dumps(dataclasses.asdict(results[-1])), flush=True)
    print(row(settings, results))


if __name__ == "__main__":
    main()
