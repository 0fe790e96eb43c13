"""Meshloom and torchtitan in turns on the same machine: one row of the table in docs/performance.md.

    python benchmarks/beside_torchtitan.py model=1B batch=4 rounds=3
    python benchmarks/beside_torchtitan.py model=3B batch=2 theirs="--activation_checkpoint.mode selective"
    python benchmarks/beside_torchtitan.py model=8B batch=2 gpus=2 ours="float8=tensorwise" theirs="…" logs=folder

`ours` are more arguments of throughput.py, `theirs` of torchtitan; both sides take `batch` sequences of 8,192 tokens per GPU
and step. The first run of each system starts with an empty compile cache, which the later ones find filled. Prints a row per
run as JSON (rate, memory, seconds from the start of the launcher to the first loss, and the median clock and power of
the busiest GPU while it ran) and the table's row at the end.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from arguments import read

HERE = Path(__file__).parent
WARM_UP = 4  # steps; torchtitan's first averages hold compilation
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
TITAN_STEP = re.compile(r"step:\s*(\d+).*?loss:\s*([\d.]+).*?memory:\s*([\d.]+)GiB.*?tps:\s*([\d,]+)")


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
    logs: str = ""


@dataclasses.dataclass
class Measured:
    """One run. tokens/s/GPU: median, least and most; GiB at the peak; seconds to the first loss; MHz and W while it ran."""

    system: str
    rate: float
    least: float
    most: float
    memory: float
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
    launcher = ["torchrun", "--standalone", "--nproc-per-node", str(settings.gpus)]
    if system == "meshloom" and settings.gpus == 1:
        launcher = [sys.executable]  # as `meshloom train` does; torchtitan has no other way than torchrun
    environment = {
        **os.environ,
        "TORCHINDUCTOR_CACHE_DIR": str(cache / system / "inductor"),
        "TRITON_CACHE_DIR": str(cache / system / "triton"),
        "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR": str(cache / system / "flash"),
        "QUACK_CACHE_DIR": str(cache / system / "quack"),
        "MESHLOOM_CACHE": str(cache / system / "meshloom"),
        "PYTHONUNBUFFERED": "1",
    }
    watch, began = Watch(), time.perf_counter()
    command = [*launcher, *(our_command(settings) if system == "meshloom" else their_command(settings))]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    lines = [(time.perf_counter() - began, COLOUR.sub("", line)) for line in process.stdout]
    code = process.wait()
    clock, power = watch.stop()
    text = "".join(f"{seconds:8.2f} {line}" for seconds, line in lines)
    if settings.logs:
        Path(settings.logs).mkdir(parents=True, exist_ok=True)
        Path(settings.logs, f"{system}-{number}.log").write_text(f"{shlex.join(command)}\n{text}")
    if code:
        raise SystemExit(f"{shlex.join(command)} ended with code {code}:\n{text[-4000:]}")
    measured = read_ours(lines) if system == "meshloom" else read_theirs(lines)
    measured.clock, measured.power = clock, power
    return measured


def our_command(settings: Settings) -> list[str]:
    """Of throughput.py."""
    shape = [f"model={settings.model}", f"batch={settings.batch}", f"steps={settings.steps}", f"warmup={WARM_UP}"]
    return [str(HERE / "throughput.py"), *shape, *shlex.split(settings.ours)]


def their_command(settings: Settings) -> list[str]:
    """Of torchtitan, as many timed steps as ours."""
    steps = ["--training.steps", str(settings.steps + WARM_UP), "--metrics.log_freq", "4"]
    shape = ["--model.flavor", settings.model, "--training.local_batch_size", str(settings.batch)]
    fixed = ["--training.seq_len", "8192", "--compile.enable"]
    return [str(HERE / "torchtitan_synthetic.py"), *steps, *shape, *fixed, *shlex.split(settings.theirs)]


def read_ours(lines: Sequence[tuple[float, str]]) -> Measured:
    """From throughput.py's output."""
    first = next(seconds for seconds, line in lines if line.startswith("first step:"))
    result = json.loads(next(line for _, line in lines if line.startswith("{")))
    rate, least, most = (result[key] for key in ("tokens_per_second_per_gpu", "least", "most"))
    return Measured("meshloom", rate, least, most, result["memory_gib"] or 0.0, first, result["first_loss"])


def read_theirs(lines: Sequence[tuple[float, str]]) -> Measured:
    """From torchtitan's log: its averages over 4 steps, those of the warm-up left out."""
    found = [(seconds, match) for seconds, line in lines if (match := TITAN_STEP.search(line))]
    rates = [float(match[4].replace(",", "")) for _, match in found if int(match[1]) > WARM_UP]
    memory = max(float(match[3]) for _, match in found)
    first_seconds, first = found[0]
    return Measured("torchtitan", statistics.median(rates), min(rates), max(rates), memory, first_seconds, float(first[2]))


def row(settings: Settings, results: Sequence[Measured]) -> str:
    """Medians over the rounds, with the least and the most of any; the first loss is the first run's, with a cold cache."""

    def cell(system: str) -> tuple[str, Measured]:
        mine = [result for result in results if result.system == system]
        middle = {field: statistics.median(getattr(each, field) for each in mine) for field in ("rate", "memory")}
        least, most = min(each.least for each in mine), max(each.most for each in mine)
        whole = Measured(system, middle["rate"], least, most, middle["memory"], mine[0].first_step, mine[0].first_loss)
        text = (
            f"{whole.rate:,.0f} ({least:,.0f}–{most:,.0f}), {whole.memory:.1f} GiB, first loss after {whole.first_step:.1f} s"
        )
        return text, whole

    theirs, titan = cell("torchtitan")
    ours, own = cell("meshloom")
    work = f"{settings.model}, {settings.gpus} GPU, {settings.batch} × 8,192"
    ratios = f"{own.rate / titan.rate:.3f} × rate, {own.memory / titan.memory:.3f} × memory"
    return f"| {work} | {theirs} | {ours} | {ratios}, {own.first_step / titan.first_step:.2f} × first loss |"


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
