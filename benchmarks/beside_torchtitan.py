"""Meshloom and torchtitan in turns on the same machine: one row of the table in docs/performance.md.

    python benchmarks/beside_torchtitan.py model=1B batch=4 rounds=3
    python benchmarks/beside_torchtitan.py model=3B batch=2 theirs="--activation_checkpoint.mode selective"
    python benchmarks/beside_torchtitan.py model=8B batch=2 gpus=2 ours="trainer.float8=tensorwise" theirs="…" logs=folder
    python benchmarks/beside_torchtitan.py model=moe_a batch=4 newer=folder balance=forced
    python benchmarks/beside_torchtitan.py model=qwen3_1.7b newer=folder
    python benchmarks/beside_torchtitan.py model=gemma3_1b batch=2 systems=titan,full,ours
    python benchmarks/beside_torchtitan.py model=1B gpus=2 shared=2 ours="parallel.tp=2" theirs="…"

Each is run as its users run it: `meshloom train` with the model's recipe, torchtitan's trainer, logging every step or fourth.
`ours` are more overrides, `theirs` more arguments of torchtitan; both take `batch` sequences of 8,192 random tokens per GPU
and step (where `shared` GPUs share a sequence or a model, by tensor, context or pipeline parallelism: per so many of them),
with one setting of PyTorch's allocator (torchtitan's own start script has this one). The first run of each system
starts with an empty compile cache, which the later ones find filled. Prints a row per run as JSON (rate; GiB that tensors
take and that the allocator holds, at most; seconds from the start of the command to the first loss, ours once the second step
is under way, when we read it; the median clock and power of the busiest GPU) and the table's row at the end. With `newer`, a
folder that holds torchtitan 0.3.0, that is run as well (`torchtitan_newer.py`). moe_a and moe_b are the mixtures of
docs/measurements/mixture_speed.md: tokens choose their experts, or with `balance=forced` every expert gets as many. `systems`
names what is run, in this order: titan, newer, ours; full is ours without the model's sliding windows. A system that fails is
said, and left out. `ep` is the number of ranks over which both deal a mixture's experts, compile=0 leaves the
compiler to neither. `altered` names what altered_train.py changes in ours. With `cache`, a folder, a later call finds what this
one has compiled. With `profile=1` our last run takes two steps more, which are not timed, and leaves a table of the last one's
kernels in `logs`.

Beside full the last line compares the two rates with the FLOPs of a token that the two count. Windows cost no more than their
share of attention if the rate rises by as much as the FLOPs fall: attention takes longer for a FLOP than matrix products do.
"""

# pyright: reportMissingImports=false

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

from meshloom.models.config import DecoderConfig
from meshloom.models.costs import head_flops, layer_flops
from meshloom.trainer.resolve import compose_config

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
    shared: int = 1
    ep: int = 1
    compile: int = 1
    rounds: int = 3
    steps: int = 24
    ours: str = ""
    theirs: str = "--activation_checkpoint.mode none"
    allocator: str = "expandable_segments:True"
    logs: str = ""
    profile: int = 0
    newer: str = ""
    balance: str = "routed"
    systems: str = "titan,newer,ours"
    altered: str = ""
    cache: str = ""


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
        self._process = None
        if shutil.which(command[0]):
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)

    def stop(self) -> tuple[float | None, float | None]:
        """Median clock (MHz) and power (W) of busy moments; None where nvidia-smi has nothing to say, or is not there."""
        if self._process is None:
            return None, None
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


MIXTURES = {
    "moe_a": ["model.experts.count=32", "model.experts.top_k=4", "model.experts.ffn_dim=1024"],
    "moe_b": ["model.experts.count=64", "model.experts.top_k=8", "model.experts.ffn_dim=512"],
}
"""Mixture → what our recipe's model is given; torchtitan's Qwen3 has norms of queries and keys, so ours has."""

DENSE = ("qwen3_1.7b", "gemma3_1b")
"""Recipes of models that torchtitan has as a Qwen3 (the second: its dims), with an untied head."""

LARGE = {"qwen3_30b_a3b": "30B-A3B"}
"""Recipe of a larger mixture → torchtitan's name of it."""

FULL = ["model.layer_types=[full]", "model.sliding_window=null", "model.rope_theta_sliding=null"]

NAMES = {"titan": "torchtitan", "newer": "torchtitan 0.3.0", "ours": "meshloom", "full": "meshloom without windows"}


def run(system: str, settings: Settings, number: int, scratch: Path) -> Measured:
    """One run of one system, in processes of its own. scratch: a folder for what it writes, and compiles."""
    output, cache = scratch / system / f"run-{number}", Path(settings.cache) if settings.cache else scratch
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
    profiled = bool(settings.profile) and number == settings.rounds - 1 and system == "ours"
    if system in ("ours", "full"):
        command = our_command(settings, output, FULL if system == "full" else [], profiled=profiled)
    else:
        command = their_command(settings) if system == "titan" else newer_command(settings)
    if system == "newer":
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (settings.newer, os.environ.get("PYTHONPATH"))))
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
        raise RuntimeError(f"{shlex.join(command)} ended with code {code}:\n{text[-4000:]}")
    if system in ("titan", "newer"):
        measured = read_theirs(NAMES[system], lines)
    else:
        measured = read_ours(NAMES[system], output / "metrics.jsonl", first.seconds, settings)
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


def our_recipe(settings: Settings) -> list[str]:
    """Of the model. A dense model of another family than Llama's is trained as Llama 1B is."""
    if settings.model in MIXTURES:
        mixture = MIXTURES[settings.model]
        return ["recipe=moe_a1b", *mixture, "model.qk_norm=head", "model.norm_eps=1e-6", "model.rope_theta=1e6"]
    if settings.model in LARGE:
        return ["recipe=moe_a1b", f"model={settings.model}"]
    if settings.model in DENSE:
        return ["recipe=llama_1b", f"model={settings.model}", "model.tied=false"]
    return [f"recipe=llama_{settings.model.lower()}"]


def our_command(settings: Settings, output: Path, more: Sequence[str], *, profiled: bool) -> list[str]:
    """Of `meshloom train`: a recipe on random tokens, which saves and evaluates nothing.

    more: the last overrides; profiled: two steps more
    """
    steps = settings.steps + WARM_UP + 2 * profiled
    work = [*our_recipe(settings), "data=synthetic", "data.seq_len=8192", f"launch.nproc={settings.gpus}"]
    batch = [f"batch.samples={settings.batch * settings.gpus // settings.shared}", f"batch.micro={settings.batch}"]
    batch += [f"parallel.ep={settings.ep}"] * (settings.ep > 1) + ["trainer.compile=false"] * (not settings.compile)
    length = ["trainer.tokens=null", f"trainer.steps={steps}", "schedule.warmup=2"]
    without = ["trainer.eval_every=0", "checkpoint.every=0", "logging.progress=false", f"output_dir={output}"]
    profile = [f"trainer.profile_step={steps}"] if profiled else []
    words = [*work, *batch, *length, *without, *profile, *shlex.split(settings.ours), *more]
    altered = [settings.altered, "balanced" if settings.balance == "forced" else ""]
    if any(altered):
        return [sys.executable, str(HERE / "altered_train.py"), ",".join(filter(None, altered)), *words]
    return [sys.executable, "-m", "meshloom.launch.cli", "train", *words]


def their_command(settings: Settings) -> list[str]:
    """Of torchtitan, as many timed steps as ours."""
    launcher = ["torchrun", "--standalone", "--nproc-per-node", str(settings.gpus)]
    steps = ["--training.steps", str(settings.steps + WARM_UP), "--metrics.log_freq", "4"]
    flavor = LARGE.get(settings.model, settings.model)
    shape = ["--model.flavor", flavor, "--training.local_batch_size", str(settings.batch)]
    fixed = ["--training.seq_len", "8192", *["--compile.enable"] * settings.compile]
    fixed += ["--parallelism.expert_parallel_degree", str(settings.ep)] * (settings.ep > 1)
    if settings.model in (*MIXTURES, *LARGE, *DENSE):
        shape += ["--model.name", "qwen3"]
    if settings.model in (*MIXTURES, *LARGE):
        fixed += ["--debug.moe_force_load_balance"] if settings.balance == "forced" else []
    return [*launcher, str(HERE / "torchtitan_synthetic.py"), *steps, *shape, *fixed, *shlex.split(settings.theirs)]


def newer_command(settings: Settings) -> list[str]:
    """Of torchtitan 0.3.0, as many timed steps as ours."""
    launcher = ["torchrun", "--standalone", "--nproc-per-node", str(settings.gpus), str(HERE / "torchtitan_newer.py")]
    work = {"model": settings.model, "batch": settings.batch, "balance": settings.balance, "ep": settings.ep}
    return [*launcher, *(f"{key}={value}" for key, value in work.items()), f"steps={settings.steps + WARM_UP}"]


def read_ours(system: str, path: Path, first_step: float, settings: Settings) -> Measured:
    """From the run's metrics."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows = rows[: settings.steps + WARM_UP]
    rates = [row["tokens_per_second"] / settings.gpus for row in rows[WARM_UP:]]
    allocated, reserved = (rows[-1].get(key, math.nan) for key in ("memory_gib", "memory_reserved_gib"))
    return Measured(system, statistics.median(rates), min(rates), max(rates), allocated, reserved, first_step, rows[0]["loss"])


def read_theirs(system: str, lines: Sequence[tuple[float, str]]) -> Measured:
    """From torchtitan's log: its averages over 4 steps, those of the warm-up left out."""
    found = [(seconds, match) for seconds, line in lines if (match := TITAN_STEP.search(line))]
    rates = [float(match[3].replace(",", "")) for _, match in found if int(match[1]) > WARM_UP]
    peaks = next(match for _, line in lines if (match := TITAN_PEAKS.search(line)))
    first_seconds, first = found[0]
    memory = float(peaks[1]), float(peaks[2])
    return Measured(system, statistics.median(rates), min(rates), max(rates), *memory, first_seconds, float(first[2]))


def row(settings: Settings, results: Sequence[Measured]) -> str:
    """Medians over the rounds, with the least and the most of any; the first loss is the first run's, with a cold cache."""
    cells: list[str] = []
    own = _median([result for result in results if result.system == NAMES["ours"]])
    for system in dict.fromkeys(result.system for result in results):
        whole = _median([result for result in results if result.system == system])
        assert whole is not None
        memory = f"{whole.allocated:.1f} GiB of tensors, {whole.reserved:.1f} held"
        rate = f"{whole.rate:,.0f} ({whole.least:,.0f}–{whole.most:,.0f})"
        cells.append(f"{system}: {rate}, {memory}, first loss after {whole.first_step:.1f} s")
        if own is not None and whole.system != own.system:
            memory = f"{own.allocated / whole.allocated:.3f} × tensors, {own.reserved / whole.reserved:.3f} × held"
            start = f"{own.first_step / whole.first_step:.2f} × first loss"
            cells.append(f"ours: {own.rate / whole.rate:.3f} × rate, {memory}, {start}")
    balance = f", {settings.balance}" if settings.model in (*MIXTURES, *LARGE) else ""
    work = f"{settings.model}, {settings.gpus} GPU, {settings.batch} × 8,192{balance}"
    return f"| {work} | {' | '.join(cells)} |"


def _median(mine: Sequence[Measured]) -> Measured | None:
    if not mine:
        return None
    fields = ("rate", "allocated", "reserved")
    rate, allocated, reserved = (statistics.median(getattr(each, field) for each in mine) for field in fields)
    least, most = min(each.least for each in mine), max(each.most for each in mine)
    return Measured(mine[0].system, rate, least, most, allocated, reserved, mine[0].first_step, mine[0].first_loss)


def windows_line(settings: Settings, results: Sequence[Measured]) -> str:
    """Our rate with windows over that without, beside the FLOPs of a token without over those with."""
    own, full = (_median([each for each in results if each.system == NAMES[system]]) for system in ("ours", "full"))
    if own is None or full is None:
        return "windows: nothing to compare"
    without, counted = _flops(settings, FULL), _flops(settings, [])
    return (
        f"windows: {own.rate / full.rate:.3f} × the rate of full attention; "
        f"FLOPs of a token {without / 1e9:.3f} and {counted / 1e9:.3f} G, {without / counted:.3f} ×"
    )


def _flops(settings: Settings, more: Sequence[str]) -> float:
    """Count the FLOPs of a token, forward and backward, with the half of attention that is not masked."""
    model = compose_config([*our_recipe(settings), *shlex.split(settings.ours), *more])[0].model
    assert isinstance(model, DecoderConfig)
    return 3 * (sum(layer_flops(block, 8192) for block in model.blocks()) + head_flops(model))


def main() -> None:
    """Run the systems in turns and print."""
    settings = read(Settings(), sys.argv[1:])
    systems = [system for system in settings.systems.split(",") if system != "newer" or settings.newer]
    results: list[Measured] = []
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(settings.rounds):
            for system in systems:
                try:
                    results.append(run(system, settings, number, Path(scratch)))
                except (RuntimeError, StopIteration, IndexError, statistics.StatisticsError) as error:
                    print(f"{NAMES[system]} failed: {error!r}"[:5000], flush=True)
                    continue
                print(json.dumps(dataclasses.asdict(results[-1])), flush=True)
    print(row(settings, results))
    if "full" in systems:
        print(windows_line(settings, results))


if __name__ == "__main__":
    main()
