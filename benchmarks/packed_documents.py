"""Packed documents with attention inside each: rows of several lengths, hybrid assignment, and the error of the cost model.

    python benchmarks/packed_documents.py out=results.jsonl                     all parts on one GPU, torchtitan beside
    python benchmarks/packed_documents.py out=results.jsonl gpus=2              documents shared by two GPUs

Each part is a process of its own, with a time limit; what follows goes on where one fails. Every figure is a line of JSON.

part=rows    tokens/s and memory on rows of `rows` tokens, `tokens` tokens a step (`torchtitan_packed.py` takes the same)
part=hybrid  the documents of rows of `rows` tokens in rows of `capacity`, by the rule of parallel.hdp=greedy
part=cost    seconds of rows of given documents; a cost model is fitted to some, and predicts the others
part=ranks   rows of `rows` tokens on several GPUs: whole on each, cut by context parallelism over all of them (context) or over
             so many (context2), and by hybrid data parallelism
"""

# pyright: basic, reportMissingImports=false

from __future__ import annotations

import gc
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from arguments import read
from packed_rows import PackedSamples, draw_rows, micro_batch
from processes import GRACE, end
from throughput import MODELS, Clock
from throughput import Settings as Training
from throughput import build as build_engine

from meshloom.data.assignment import Assigner, Share
from meshloom.data.batch import GlobalBatch
from meshloom.models.config import DecoderConfig
from meshloom.parallel.config import ParallelConfig
from meshloom.parallel.engine import Engine
from meshloom.parallel.hybrid.cost import ATTENTION_SPEED, CostModel, costs_of, decoder_flops
from meshloom.parallel.hybrid.share import HybridAssigner
from meshloom.parallel.mesh import Mesh, environment_world_size

HERE = Path(__file__).parent


@dataclass
class Settings:
    """One measurement. rows, lengths, longest: several, with commas.

    longest: documents are cut there; 0: at the row's length; tokens: of a step; at_once: of a micro-batch, where a row has no
    more; ways: of part=ranks, in their order; total: seconds of all parts
    """

    part: str = "all"
    out: str = ""
    gpus: int = 1
    model: str = "1B"
    vocabulary: int = 128_256
    lengths: str = "magi,github"
    rows: str = "8192,32768"
    tokens: int = 65_536
    at_once: int = 32_768
    capacity: int = 32_768
    longest: str = "0"
    ways: str = "hybrid,context,whole"
    activation: str = "none"
    compile: int = 1
    warmup: int = 2
    steps: int = 3
    total: int = 570


def main() -> None:
    """Run one part here, or all of them one after another."""
    settings = read(Settings(), sys.argv[1:])
    if settings.part == "all":
        run_parts(settings)
        return
    {"rows": measure_rows, "hybrid": measure_hybrid, "cost": measure_costs, "ranks": measure_ranks}[settings.part](settings)


def say(settings: Settings, **found: Any) -> None:
    """Print a line of JSON, and append it to `out`."""
    line = json.dumps(
        {"part": settings.part, "system": "meshloom", "model": settings.model, "torch": torch.__version__, **found}
    )
    print(line, flush=True)
    if settings.out:
        with Path(settings.out).open("a") as file:
            file.write(line + "\n")


def build(settings: Settings, seq: int, **parallel: Any) -> tuple[Engine, Mesh]:
    """The engine for this process."""
    return build_engine(
        Training(
            model=settings.model, vocabulary=settings.vocabulary, seq=seq, activation=settings.activation, zero=1,
            compile=settings.compile, precision="bf16" if torch.cuda.is_available() else "fp32", **parallel,
        )
    )  # fmt: skip


def timed(settings: Settings, engine: Engine, shares: Sequence[Share], tokens: float) -> dict[str, Any]:
    """Train on the shares in turn, and measure a step and the memory. tokens: of the global batch with loss."""
    device = engine.mesh.device
    counted = torch.tensor(float(tokens), device=device)
    losses: list[float] = []

    def step(number: int) -> torch.Tensor:
        loss = engine.accumulate(shares[number % len(shares)], counted)
        engine.clip(1.0, engine.gradient_norm())
        engine.update(1e-5)
        engine.zero_grad()
        return loss.mean

    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    losses.append(float(step(0)))
    first = time.perf_counter() - began
    for number in range(1, settings.warmup):
        losses.append(float(step(number)))
    gc.collect()
    clock = Clock(device)
    for number in range(settings.warmup, settings.warmup + settings.steps):
        step(number)
        clock.tick()
    seconds = clock.seconds()
    cuda = device.type == "cuda"
    return {
        "step_seconds": round(statistics.median(seconds), 4),
        "least": round(min(seconds), 4),
        "most": round(max(seconds), 4),
        "allocated_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1) if cuda else None,
        "reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 1) if cuda else None,
        "other_gib": round(other_memory() / 2**30, 1) if cuda else None,
        "first_step_seconds": round(first, 1),
        "first_losses": losses,
    }


def other_memory() -> int:
    """Return the bytes of this GPU that are in use and that PyTorch's allocator does not hold: CUDA's own, and NCCL's."""
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


def recompile() -> None:
    """Have the compiler forget what it has compiled: it makes slower kernels for a second length than for a first."""
    torch._dynamo.reset()
    gc.collect()


def on_device(share: Share, mesh: Mesh) -> Share:
    """The share with its micro-batches on the device."""
    batches = [each.to(mesh.device) for each in share.micro_batches]
    return Share(batches, share.passes, share.workers, flops=share.flops)


def measure_rows(settings: Settings) -> None:
    """part=rows"""
    lengths = list(map(int, settings.rows.split(",")))
    engine, mesh = build(settings, max(lengths))
    flops = decoder_flops(DecoderConfig(vocabulary=settings.vocabulary, **MODELS[settings.model]))  # type: ignore[arg-type]
    for length in lengths:
        recompile()
        for name, cut in itertools.product(settings.lengths.split(","), map(int, settings.longest.split(","))):
            micro, passes = max(1, settings.at_once // length), max(1, settings.tokens // max(length, settings.at_once))
            rows = draw_rows(name, length, 2 * micro * passes, cut or length)
            batches = [
                micro_batch(rows[at : at + micro], settings.vocabulary, at).to(mesh.device) for at in range(0, len(rows), micro)
            ]
            shares = [Share(batches[:passes], passes, passes), Share(batches[passes:], passes, passes)]
            work = sum(flops.documents([document for row in rows for document in row])) / 2
            report(settings, timed, engine, shares, length, name, micro * passes * length, work, longest=cut or length)
    engine.finish()
    mesh.close()


def report(
    settings: Settings,
    measure: Callable[..., dict[str, Any]],
    engine: Engine,
    shares: Sequence[Share],
    length: int,
    name: str,
    tokens: int,
    work: float,
    **more: Any,
) -> None:
    """Measure one work, and say what came of it; an error, too. work: FLOPs of a step by convention."""
    told = {"rows": length, "lengths": name, "activation": settings.activation, "vocabulary": settings.vocabulary, **more}
    try:
        found = measure(settings, engine, shares, tokens)
    except (torch.OutOfMemoryError, RuntimeError) as problem:
        say(settings, **told, error=f"{type(problem).__name__}: {str(problem)[:200]}")
        engine.zero_grad()
        gc.collect()
        return
    ranks, seconds = engine.mesh.layout.world_size, found["step_seconds"]
    rate = round(tokens / seconds / ranks)
    say(settings, **told, gpus=ranks, tokens_per_second_per_gpu=rate, tflops=round(work / seconds / ranks / 1e12, 1), **found)


def measure_hybrid(settings: Settings) -> None:
    """part=hybrid"""
    (length,) = map(int, settings.rows.split(","))
    longest = int(settings.longest) or settings.capacity
    engine, mesh = build(settings, settings.capacity, hdp="greedy", hdp_tokens=settings.capacity)
    flops = decoder_flops(DecoderConfig(vocabulary=settings.vocabulary, **MODELS[settings.model]))  # type: ignore[arg-type]
    parallel = ParallelConfig(hdp="greedy", hdp_tokens=settings.capacity, zero=1)
    assigner = HybridAssigner.of(parallel, mesh.layout, length, flops, compiled=True)
    recompile()
    for name in settings.lengths.split(","):
        count = max(1, settings.tokens // length)
        samples = PackedSamples(draw_rows(name, length, 2 * count, longest), settings.vocabulary)
        shares = [on_device(assigner.load(samples, GlobalBatch(at, count), 1, mesh.data_rank), mesh) for at in (0, count)]
        positions = [sum(row.tokens_BS.shape[1] for row in share.micro_batches) for share in shares]
        more = {"capacity": settings.capacity, "positions": positions, "longest": longest}
        report(settings, timed, engine, shares, length, name, count * length, shares[0].flops or 0.0, **more)
    engine.finish()
    mesh.close()


def measure_costs(settings: Settings) -> None:
    """part=cost"""
    lengths = list(map(int, settings.rows.split(",")))
    engine, mesh = build(settings, max(lengths))
    rows: list[list[int]] = []
    drawn: list[bool] = []
    for length in lengths:
        equal = [[length // parts] * parts for parts in (1, 2, 4, 16, 64)]
        packed = [draw_rows(name, length, 1, length, seed)[0] for name in settings.lengths.split(",") for seed in (1,)]
        rows += equal + packed
        drawn += [False] * len(equal) + [True] * len(packed)
    seconds: list[float] = []
    latest = 0
    for row in rows:
        if sum(row) != latest:
            if latest:  # said again with every length: the time may not suffice for the next one
                report_fit(settings, rows[: len(seconds)], seconds, drawn[: len(seconds)])
            recompile()
            latest = sum(row)
        batch = micro_batch([row], settings.vocabulary, 0).to(mesh.device)
        share = Share([batch], passes=1, workers=1)
        tokens = torch.tensor(float(latest), device=mesh.device)

        def accumulate(share: Share = share, tokens: torch.Tensor = tokens) -> None:
            engine.accumulate(share, tokens)
            engine.zero_grad()

        accumulate()
        clock = Clock(mesh.device)
        for _ in range(settings.steps):
            accumulate()
            clock.tick()
        seconds.append(statistics.median(clock.seconds()))
        say(settings, row=row if len(row) <= 64 else f"{len(row)} documents of {sum(row)}", seconds=round(seconds[-1], 5))
    report_fit(settings, rows, seconds, drawn)
    engine.finish()
    mesh.close()


def fitted_costs(measured: Sequence[tuple[Sequence[int], float]]) -> CostModel:
    """Fit quadratic, linear and per-row costs by least squares of relative errors; none is below 0.

    Rows of one length can't tell the cost of a row from that of its tokens: it is then left at 0.
    """
    table = np.array([[sum(n * n for n in row), sum(row), 1.0] for row, _ in measured], np.float64)
    table /= np.array([each for _, each in measured], np.float64)[:, None]
    kept = [0, 1, 2] if len({sum(row) for row, _ in measured}) > 1 else [0, 1]
    while True:
        found, *_ = np.linalg.lstsq(table[:, kept], np.ones(len(table)), rcond=None)
        if min(found) >= 0:
            values = dict(zip(kept, found.tolist(), strict=True))
            return CostModel(values.get(0, 0.0), values.get(1, 0.0), values.get(2, 0.0))
        del kept[int(np.argmin(found))]


def report_fit(settings: Settings, rows: Sequence[Sequence[int]], seconds: Sequence[float], drawn: Sequence[bool]) -> None:
    """Fit a cost model to the rows of equal documents, and say how far it is off for the others; and today's estimate."""
    fit = fitted_costs([(row, each) for row, each, is_drawn in zip(rows, seconds, drawn, strict=True) if not is_drawn])
    flops = decoder_flops(DecoderConfig(vocabulary=settings.vocabulary, **MODELS[settings.model]))  # type: ignore[arg-type]
    estimated = costs_of(flops)

    def predicted(costs: CostModel, row: Sequence[int]) -> float:
        return sum(costs.documents(row)) + costs.row

    def errors(costs: CostModel, scale: float, wanted: bool) -> list[float]:
        return [
            round(scale * predicted(costs, row) / each - 1, 4)
            for row, each, is_drawn in zip(rows, seconds, drawn, strict=True)
            if is_drawn is wanted
        ]

    scale = statistics.median(each / predicted(estimated, row) for row, each in zip(rows, seconds, strict=True))
    say(
        settings,
        fit={"quadratic": fit.quadratic, "linear": fit.linear, "row": fit.row},
        equal_at=round(fit.linear / fit.quadratic) if fit.quadratic else None,
        attention_speed=round(flops.quadratic / 2 / flops.linear * fit.linear / fit.quadratic, 3) if fit.quadratic else None,
        attention_speed_today=ATTENTION_SPEED,
        row_tokens=round(fit.row / fit.linear),
        errors_of_rows_fitted=errors(fit, 1.0, False),
        errors_of_packed_rows=errors(fit, 1.0, True),
        errors_of_estimate=errors(estimated, scale, True),
    )


def measure_ranks(settings: Settings) -> None:
    """part=ranks: run under torchrun."""
    (length,) = map(int, settings.rows.split(","))
    flops = decoder_flops(DecoderConfig(vocabulary=settings.vocabulary, **MODELS[settings.model]))  # type: ignore[arg-type]
    count = max(1, settings.tokens // length)
    ways: dict[str, dict[str, Any]] = {
        "hybrid": {"hdp": "greedy", "hdp_tokens": settings.capacity},
        "context": {"cp": environment_world_size()},
        "whole": {},
    }
    for way in settings.ways.split(","):
        parallel = ways[way] if way in ways else {"cp": int(way.removeprefix("context"))}
        settings.activation = "selective" if way == "whole" else "none"  # whole rows do not fit without
        engine, mesh = build(settings, length, **parallel)
        config = ParallelConfig(zero=1, **parallel)
        for name in settings.lengths.split(","):
            samples = PackedSamples(draw_rows(name, length, 2 * count, length), settings.vocabulary)
            if "hdp" in parallel:
                assigner: Any = HybridAssigner.of(config, mesh.layout, length, flops, compiled=True)
            else:
                assigner = Assigner(mesh.layout.data_size)
            loaded = [assigner.load(samples, GlobalBatch(at, count), 1, mesh.data_rank) for at in (0, count)]
            shares = [on_device(share, mesh) for share in loaded]
            work = sum(flops.documents([n for at in range(count) for n in samples.lengths(at)]))
            rank = {} if mesh.is_main else {"rank": mesh.rank}
            report(settings, timed, engine, shares, length, name, count * length, work, way=way, **rank)
        engine.finish()
        del engine
        recompile()  # what was compiled holds the engine


def run_parts(settings: Settings) -> None:
    """Run every part in a process of its own."""
    python, here, out = sys.executable, str(HERE / "packed_documents.py"), f"out={settings.out}"
    titan = [python, str(HERE / "torchtitan_packed.py"), out, f"vocabulary={settings.vocabulary}", f"model={settings.model}"]
    ours = [python, here, out, f"vocabulary={settings.vocabulary}", f"model={settings.model}"]
    long = ["rows=131072", "tokens=131072", "steps=2", "warmup=1"]
    if settings.gpus > 1:
        start = [python, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={settings.gpus}", here, out]
        work = ["part=ranks", "rows=131072", f"tokens={131_072 * settings.gpus}", "capacity=65536", "steps=2", "warmup=1"]
        own = [f"vocabulary={settings.vocabulary}", f"model={settings.model}", f"lengths={settings.lengths}"]
        ways = settings.ways.split(",")  # each in processes of its own: one that hangs leaves time for the next
        parts = [(settings.total // len(ways), [*start, *work, *own, f"ways={way}"]) for way in ways]
    else:
        parts = [
            (120, [*ours, "part=rows"]),
            (120, [*titan, "part=rows"]),
            (100, [*ours, "part=cost", "rows=32768,8192"]),
            (80, [*ours, "part=rows", *long, "activation=selective", "longest=0,32768"]),
            (90, [*titan, "part=rows", *long, "activation=selective"]),
            (80, [*ours, "part=hybrid", *long, "capacity=32768"]),
        ]
    started = time.perf_counter()
    for most, command in parts:
        began = time.perf_counter()
        limit = min(most, settings.total - (began - started)) - GRACE
        if limit < 20:
            print("# no time left for", *command[1:], flush=True)
            continue
        print("$", *command[1:], flush=True)
        process = subprocess.Popen(command, start_new_session=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})
        try:
            told = f"ended with {process.wait(limit)}"
        except subprocess.TimeoutExpired:
            end(process)
            told = "was stopped"
        print(f"# {told} after {time.perf_counter() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
