"""Measure the cost of optimizers beside AdamW: seconds and memory of a step of Llama 1B on random tokens.

    python benchmarks/optimizer_cost.py
    python benchmarks/optimizer_cost.py runs=adamw,muon,adamw model=tiny steps=2

Each run is a `meshloom train` of its own with 4 micro-batches of 4 × 8,192 tokens a step. All share what is compiled.
Prints a line of JSON per run, and the medians over AdamW's: docs/measurements/optimizers.md.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from arguments import read

WARM_UP = 3  # steps that compile and choose kernels

WAYS = {
    "adamw": ["optim=adamw"],
    "muon": ["optim=muon"],
    "normuon": ["optim=normuon"],
    "adamw_8bit": ["optim=adamw_8bit"],
    "stochastic": ["optim=adamw", "trainer.masters=bf16_stochastic"],
}
"""Run → its keys."""

MODELS = {
    "1B": ["recipe=llama_1b", "data.seq_len=8192", "batch.micro=4", "batch.samples=16", "trainer.activation=none"],
    "tiny": ["recipe=llama_1b", "model.layers=1", "model.dim=64", "model.heads=2", "model.kv_heads=2", "model.ffn_dim=128",
             "data.vocabulary=512", "data.seq_len=64", "batch.micro=2", "batch.samples=4", "precision=fp32",
             "trainer.activation=none", "trainer.compile=false"],
}  # fmt: skip


@dataclasses.dataclass
class Settings:
    """A comparison. runs: names of WAYS, in their order; steps: timed ones of a run; cache: for what is compiled.

    logs: a folder for a table of the kernels of one step more of each run
    """

    runs: str = "adamw,muon,adamw,adamw_8bit,stochastic"
    model: str = "1B"
    steps: int = 8
    cache: str = ""
    logs: str = ""


def measure(way: str, settings: Settings, folder: Path) -> dict[str, float | str]:
    """Train, and read seconds and GiB from the run's metrics. Raises RuntimeError if it fails."""
    last = WARM_UP + settings.steps
    length = ["trainer.tokens=null", f"trainer.steps={last + 2 * bool(settings.logs)}", "schedule.warmup=2"]
    length += [f"trainer.profile_step={last + 2}"] if settings.logs else []
    nothing_else = ["trainer.eval_every=0", "checkpoint.every=0", "logging.progress=false", f"output_dir={folder}"]
    words = [*MODELS[settings.model], "launch.nproc=1", *length, *nothing_else, *WAYS[way]]
    began = time.perf_counter()
    command = [sys.executable, "-m", "meshloom.launch.cli", "train", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{way} ended with code {done.returncode}:\n{(done.stdout + done.stderr)[-3000:]}")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for table in folder.glob("profile/*.txt"):
        shutil.copy(table, Path(settings.logs, f"{way}.txt"))
    timed = [row["step_seconds"] for row in rows if "step_seconds" in row][WARM_UP:last]
    return {
        "run": way,
        "step_ms": round(1000 * statistics.median(timed), 2),
        "least": round(1000 * min(timed), 2),
        "most": round(1000 * max(timed), 2),
        "allocated_gib": round(rows[-1].get("memory_gib", float("nan")), 2),
        "reserved_gib": round(rows[-1].get("memory_reserved_gib", float("nan")), 2),
        "last_loss": rows[-1]["loss"],
        "seconds": round(time.perf_counter() - began, 1),
    }


def main() -> None:
    """Measure the runs in their order and print."""
    settings = read(Settings(), sys.argv[1:])
    found: list[dict[str, float | str]] = []
    if settings.logs:
        Path(settings.logs).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        for variable in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "QUACK_CACHE_DIR", "MESHLOOM_CACHE"):
            os.environ[variable] = str(Path(settings.cache or scratch) / variable.lower())
        for number, way in enumerate(settings.runs.split(",")):
            try:
                found.append(measure(way, settings, Path(scratch) / f"run-{number}"))
            except RuntimeError as problem:
                print(problem, flush=True)
                continue
            print(json.dumps(found[-1]), flush=True)
    usual = [float(row["step_ms"]) for row in found if row["run"] == "adamw"]
    for way in dict.fromkeys(str(row["run"]) for row in found):
        times = [float(row["step_ms"]) for row in found if row["run"] == way]
        if usual:
            print(f"{way}: {statistics.median(times) / statistics.median(usual):.4f} × the step of adamw")


if __name__ == "__main__":
    main()
