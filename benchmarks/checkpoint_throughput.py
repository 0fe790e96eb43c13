"""Measure what checkpoints cost a run: tokens per second with one every few steps beside none, and the time of each save.

    torchrun --standalone --nproc-per-node 1 benchmarks/checkpoint_throughput.py --folder DISK --out FILE.json
    torchrun --standalone --nproc-per-node 2 benchmarks/checkpoint_throughput.py --folder DISK

The trainer's own loop, hooks and saves, on Llama 1B with 4 × 8,192 synthetic tokens per GPU (17 GiB a save; `--model tiny` for
a try on a CPU). Phases of so many steps follow each other in one process: none · to the disk · none · to the disk and into
memory. Where the disk is slower than the schedule a save to it is skipped, as the log says, and only the in-memory tier has
the snapshot. Steps are timed by events on the device; the phases' ends wait for the disk outside of the time.
"""

from __future__ import annotations

import argparse
import itertools
import json
import mmap
import os
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from meshloom.checkpoint.checkpointer import Checkpointer
from meshloom.checkpoint.config import CheckpointConfig
from meshloom.data.build import build_node
from meshloom.parallel.layout import Layout
from meshloom.parallel.mesh import Mesh, environment_world_size, pick_device
from meshloom.trainer.build import build_control, build_run
from meshloom.trainer.hooks.base import Hook
from meshloom.trainer.hooks.saving import Saving
from meshloom.trainer.loop import Loop
from meshloom.trainer.schema import make_composer
from meshloom.trainer.typed import typed_config

MODELS = {
    "1B": ["recipe=llama_1b", "batch.micro=4"],
    "tiny": ["recipe=quickstart", "data=synthetic", "data.vocabulary=4096", "batch.micro=4"],
}


class Rows(Hook):
    """Keeps what the saves report."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def on_checkpoint(self, loop: Loop, row: dict[str, Any]) -> None:
        """One save has ended."""
        self.rows.append(row)


def timed(loop: Loop, steps: int) -> list[float]:
    """Seconds of each of so many steps as `Loop.run` takes them, measured on the device without waiting for it."""
    cuda = loop.mesh.device.type == "cuda"
    ticks: list[Any] = []

    def tick() -> None:
        ticks.append(torch.cuda.Event(enable_timing=True) if cuda else time.perf_counter())
        if cuda:
            ticks[-1].record()

    tick()
    for _ in range(steps):
        loop.step()
        for hook in loop.hooks:
            hook.on_step_end(loop)
        tick()
    if cuda:
        torch.cuda.synchronize()
        return [before.elapsed_time(after) / 1000 for before, after in itertools.pairwise(ticks)]
    return [after - before for before, after in itertools.pairwise(ticks)]


def disk_rate(folder: Path, gib: float) -> float:
    """10⁹ bytes a second of one thread's O_DIRECT writes with a closing fsync, the floor for any checkpoint."""
    path = folder / "raw"
    buffer = mmap.mmap(-1, 32 << 20)
    buffer[:] = os.urandom(1 << 20) * 32
    start = time.perf_counter()
    descriptor = os.open(path, os.O_CREAT | os.O_WRONLY | getattr(os, "O_DIRECT", 0))
    count = max(1, int(gib * 32))
    for index in range(count):
        os.pwrite(descriptor, buffer, index * len(buffer))
    os.fsync(descriptor)
    took = time.perf_counter() - start
    os.close(descriptor)
    path.unlink()
    return count * len(buffer) / took / 1e9


def saving_phase(loop: Loop, folder: Path, config: CheckpointConfig, steps: int) -> dict[str, Any]:
    """Steps with saves, and what became of these; the folder is deleted afterwards."""
    checkpointer = Checkpointer(folder, build_control(loop.mesh, folder.name), config)
    saving, rows, without = Saving(checkpointer, config.every, {}), Rows(), loop.hooks
    saving.on_run_begin(loop)
    loop.hooks = [*without, saving, rows]
    try:
        assert config.every is not None
        start = time.perf_counter()
        timed(loop, 3 + -(loop.progress.step + 1) % config.every)  # the plan and the memory, and the first save, uncounted
        loop.deliver_metrics(keep=0)
        for report in checkpointer.wait():
            rows.on_checkpoint(loop, {"checkpoint_step": report.step, **report.metrics()})
        warm = time.perf_counter() - start
        first, rows.rows = rows.rows, []
        seconds = timed(loop, steps)
        loop.deliver_metrics(keep=0)
        for report in checkpointer.wait():
            rows.on_checkpoint(loop, {"checkpoint_step": report.step, **report.metrics(), "outcome": report.outcome})
    finally:
        checkpointer.close()
        loop.hooks = without
        loop.mesh.barrier()
        if loop.mesh.is_main:
            shutil.rmtree(folder, ignore_errors=True)
    return {"seconds": seconds, "saves": rows.rows, "first": first, "warm_up": warm}


def main() -> None:
    """Run the phases; rank 0 prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="1B")
    parser.add_argument("--every", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warm-up", type=int, default=8)
    parser.add_argument("--folder", type=Path, default=Path())
    parser.add_argument("--raw-gib", type=float, default=4.0)
    parser.add_argument("--phases", default="none disk none memory none")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    world = environment_world_size()
    quiet = ["trainer.tokens=null", "trainer.steps=100000", "trainer.eval_every=0", "trainer.sample_prompt=null"]
    quiet += ["trainer.activation=none", "logging.progress=false", "checkpoint.every=0", f"batch.samples={4 * world}"]
    folder = arguments.folder / "checkpoint-throughput"
    composition = make_composer().compose([*MODELS[arguments.model], *quiet, f"output_dir={folder}"])
    assert not composition.problems, composition.problems
    config, _ = typed_config(composition.config)
    data = build_node(config.data, config.seed, config.model.vocabulary)
    data.prepare()
    mesh = Mesh.connect(Layout.plan(config.parallel, world), pick_device())
    folder.mkdir(parents=True, exist_ok=True)
    run = build_run(config, {}, data, mesh)
    loop = run.loop
    result: dict[str, Any] = {"gpus": world, "every": arguments.every, "phases": []}
    if mesh.is_main:
        result["raw_gigabytes_per_second"] = disk_rate(folder, arguments.raw_gib)
    for hook in loop.hooks:
        hook.on_run_begin(loop)
    timed(loop, arguments.warm_up)  # compile, too
    every = arguments.every
    plans = {
        "disk": CheckpointConfig(every=every, keep=1),
        "memory": CheckpointConfig(every=every, keep=1, memory_every=every),
    }
    for number, phase in enumerate(arguments.phases.split()):
        if phase == "none":
            found: dict[str, Any] = {"seconds": timed(loop, arguments.steps), "saves": []}
        else:
            found = saving_phase(loop, folder / f"{number}-{phase}", plans[phase], arguments.steps)
        result["phases"].append({"phase": phase, **found})
        if mesh.is_main:
            report(phase, found, result["phases"], world, loop)
    if mesh.is_main and arguments.out is not None:
        arguments.out.write_text(json.dumps(result))
    run.close()
    mesh.close()
    if mesh.is_main:
        shutil.rmtree(folder, ignore_errors=True)


def report(phase: str, found: dict[str, Any], phases: list[dict[str, Any]], world: int, loop: Loop) -> None:
    """A phase's rows."""
    bare = statistics.median(second for other in phases if other["phase"] == "none" for second in other["seconds"])
    mean, median = statistics.mean(found["seconds"]), statistics.median(found["seconds"])
    rate = loop.progress.batch * loop.horizon.seq_len / world / mean
    print(
        f"\n{phase}: {rate:,.0f} tokens/s/GPU, median step {1000 * median:.1f} ms, mean {100 * (mean / bare - 1):+.2f} % of the"
    )
    print("  median step without saves; steps, ms:", *(f"{1000 * second:.0f}" for second in found["seconds"]), flush=True)
    for row in found["saves"]:
        values = {key.removeprefix("checkpoint/"): value for key, value in row.items()}
        shown = " ".join(f"{key} {values[key]:.4g}" for key in SHOWN if values.get(key))
        print(f"  save of step {row['checkpoint_step']}: {shown}", flush=True)
    if "warm_up" in found:
        values = {key.removeprefix("checkpoint/"): value for row in found["first"] for key, value in row.items()}
        first = " ".join(f"{key} {values[key]:.4g}" for key in SHOWN if values.get(key))
        print(f"  before: {found['warm_up']:.1f} s for plan, memory and a first save: {first}")


SHOWN = [
    *("stall_seconds", "staging_seconds", "keeping_seconds", "hashing_seconds", "writing_seconds", "commit_seconds"),
    *("total_seconds", "total_bytes", "gigabytes_per_second", "host_memory_bytes", "direct"),
]


if __name__ == "__main__":
    main()
