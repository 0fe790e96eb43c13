"""Tokens per second per GPU of the engine's training step on synthetic tokens: the work of the table in docs/performance.md.

    torchrun --standalone --nproc-per-node 1 benchmarks/throughput.py model=1B batch=4
    torchrun --standalone --nproc-per-node 2 benchmarks/throughput.py model=8B batch=2 zero=3 activation=selective

Arguments are key=value; `Settings` lists them. Prints one JSON line: median, least and most tokens/s/GPU over the timed
steps, peak memory, first loss, seconds to the first step. `trace=file` writes where the milliseconds of one step go.

Steps are timed by events on the device, and nothing waits for it between them, as nothing does in training.
"""

# pyright: basic, reportMissingImports=false

from __future__ import annotations

import dataclasses
import gc
import itertools
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from arguments import read

from meshloom.data.assignment import Share
from meshloom.data.batch import MicroBatch
from meshloom.models.config import DecoderConfig
from meshloom.models.decoder import Decoder
from meshloom.optim.optimizers.adamw import AdamW
from meshloom.optim.optimizers.config import AdamWConfig
from meshloom.optim.optimizers.parameters import NamedParameter, Shards
from meshloom.parallel.config import ParallelConfig
from meshloom.parallel.deepspeed.settings import DeepSpeedConfig
from meshloom.parallel.division import divide_blocks
from meshloom.parallel.engine import Engine, EngineSettings
from meshloom.parallel.engines import make_engine
from meshloom.parallel.layout import Layout
from meshloom.parallel.mesh import Mesh, environment_world_size, pick_device
from meshloom.parallel.policies import ActivationSettings
from meshloom.trainer.device_timestamp import DeviceTimestamp
from meshloom.trainer.hooks.profiling import kernel_table

MODELS = {
    "tiny": {"dim": 256, "layers": 4, "heads": 4, "kv_heads": 2, "ffn_dim": 512},
    "1B": {"dim": 2048, "layers": 16, "heads": 32, "kv_heads": 8, "ffn_dim": 8192},
    "3B": {"dim": 3072, "layers": 28, "heads": 24, "kv_heads": 8, "ffn_dim": 8192},
    "8B": {"dim": 4096, "layers": 32, "heads": 32, "kv_heads": 8, "ffn_dim": 14336},
}


@dataclasses.dataclass
class Settings:
    """One measurement. batch: sequences per data rank and step; micro: of these, how many at once (0: all)."""

    engine: str = "torch"
    model: str = "1B"
    batch: int = 4
    micro: int = 0
    seq: int = 8192
    vocabulary: int = 128_256
    zero: int = 3
    copy_engines: int = 1
    tp: int = 1
    pp: int = 1
    cp: int = 1
    schedule: str = "1f1b"
    cp_kind: str = "ring"
    hdp: str = "none"
    hdp_tokens: int = 0
    offload: str = "none"
    offload_weights: str = "none"
    offload_path: str = ""
    cpu_adam: int = 0
    activation: str = "none"
    compile: int = 1
    float8: str = "none"
    precision: str = "bf16"
    steps: int = 20
    warmup: int = 5
    trace: str = ""
    label: str = ""


def build(settings: Settings) -> tuple[Engine, Mesh]:
    """The engine for this process, and its place in the layout."""
    parallel = ParallelConfig(
        engine=settings.engine,
        zero=settings.zero,
        tp=settings.tp,
        pp=settings.pp,
        cp=settings.cp,
        schedule=settings.schedule,
        cp_kind=settings.cp_kind,
        hdp=settings.hdp,
        hdp_tokens=settings.hdp_tokens or None,
        offload=settings.offload,
        offload_weights=settings.offload_weights,
        offload_path=settings.offload_path or None,
        copy_engines=bool(settings.copy_engines),
        deepspeed=DeepSpeedConfig(cpu_adam=bool(settings.cpu_adam)),
    )
    mesh = Mesh.connect(Layout.plan(parallel, environment_world_size()), pick_device())

    def optimizer(parameters: Sequence[NamedParameter], shards: Shards) -> torch.optim.Optimizer:
        return AdamW(AdamWConfig(lr=3e-4, weight_decay=0.1, betas=[0.9, 0.95], eps=1e-8), parameters, shards)

    with torch.device("meta"):
        model = Decoder(DecoderConfig(vocabulary=settings.vocabulary, **MODELS[settings.model]))  # type: ignore[arg-type]
    policies, stages = divide_blocks(
        model.decoder_config, len(model.block_modules()), parallel, ActivationSettings(settings.activation), settings.seq
    )
    how = EngineSettings(
        policies=policies,
        stages=stages,
        seed=1,
        precision=settings.precision,
        compile=bool(settings.compile),
        float8=settings.float8,
        seq_len=settings.seq,
    )
    return make_engine(model, mesh, optimizer, parallel, how), mesh


class Clock:
    """Seconds between ticks, measured where the work is done: on a GPU without waiting for it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._ticks: list[DeviceTimestamp] = []
        self.tick()

    def tick(self) -> None:
        """The work queued so far is one more step."""
        self._ticks.append(DeviceTimestamp(self._device))

    def seconds(self) -> list[float]:
        """Of each step. Waits for the device."""
        return [after.seconds_since(before) for before, after in itertools.pairwise(self._ticks)]


def main() -> None:
    """Measure once and print the result."""
    began = time.perf_counter()
    settings = read(Settings(), sys.argv[1:])
    micro = settings.micro or settings.batch
    if settings.batch % micro:
        raise SystemExit(f"batch={settings.batch} is not a multiple of micro={micro}")
    engine, mesh = build(settings)
    draw = torch.Generator().manual_seed(mesh.data_rank)

    def share() -> Share:
        batches: list[MicroBatch] = []
        for _ in range(settings.batch // micro):
            tokens = torch.randint(0, settings.vocabulary, (micro, settings.seq + 1), generator=draw)
            batches.append(MicroBatch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()).to(mesh.device))
        return Share(batches, passes=len(batches), workers=len(batches) * mesh.layout.data_size)

    data = [share() for _ in range(4)]
    tokens_per_rank = settings.batch * settings.seq
    global_tokens = torch.tensor(float(tokens_per_rank * mesh.layout.data_size), device=mesh.device)

    def step(number: int) -> torch.Tensor:
        loss = engine.accumulate(data[number % len(data)], global_tokens)
        engine.clip(1.0, engine.gradient_norm())
        engine.update(3e-4)
        engine.zero_grad()
        return loss.mean

    def wait() -> None:
        if mesh.device.type == "cuda":
            torch.cuda.synchronize()

    first_loss = float(step(0))
    first_step = time.perf_counter() - began
    if mesh.is_main:
        print(f"first step: loss {first_loss:.5f}", flush=True)
    for number in range(1, settings.warmup):
        step(number)
    gc.collect()
    gc.disable()
    wait()
    clock = Clock(mesh.device)
    loss = torch.zeros(())
    for number in range(settings.steps):
        loss = step(number)
        clock.tick()
    seconds = clock.seconds()
    if settings.trace:
        with torch.profiler.profile() as profiler:
            step(0)
            wait()
        if mesh.is_main:
            Path(settings.trace).write_text(kernel_table(profiler))
    if mesh.is_main:
        rates = sorted(tokens_per_rank * mesh.layout.data_size / mesh.layout.world_size / second for second in seconds)
        result = {
            **{field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)},
            "gpus": mesh.layout.world_size,
            "tokens_per_second_per_gpu": round(statistics.median(rates)),
            "least": round(rates[0]),
            "most": round(rates[-1]),
            "step_ms": round(1000 * statistics.median(seconds), 1),
            "memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1) if mesh.device.type == "cuda" else None,
            "memory_reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 1) if mesh.device.type == "cuda" else None,
            "first_loss": first_loss,
            "last_loss": float(loss),
            "first_step_seconds": round(first_step, 1),
            "torch": torch.__version__,
        }
        print(json.dumps(result), flush=True)
    engine.finish()
    mesh.close()


if __name__ == "__main__":
    main()
