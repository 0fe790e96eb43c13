"""Cost of judging steps and of hashing copies: a model's step without and with them, in turns.

    python benchmarks/guard_cost.py model=1B batch=4 steps=8 rounds=3

Arguments are those of throughput.py, and `rounds`: each round times `steps` steps without a guard, then as many with one.
Prints one JSON line: the median milliseconds of both, the operations of a judgement, the milliseconds of hashing every weight
and moment on the device and on the host, and what all of it comes to if copies are compared every 50 steps.
"""

# pyright: basic, reportMissingImports=false

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from arguments import read
from throughput import Clock, Settings, build
from torch.utils._python_dispatch import TorchDispatchMode

from meshloom.data.assignment import Share
from meshloom.data.batch import MicroBatch
from meshloom.parallel.engine import StepLoss
from meshloom.parallel.replicas import hash_tensor
from meshloom.trainer.config import TrainerConfig
from meshloom.trainer.deferred import Deferred
from meshloom.trainer.device_timestamp import DeviceTimestamp
from meshloom.trainer.guard.guard import StepGuard
from meshloom.trainer.guard.journal import Journal

EVERY = 50


@dataclasses.dataclass
class Rounds(Settings):
    """Settings of throughput.py, and rounds of `steps` steps without and with a guard."""

    steps: int = 8
    rounds: int = 3


class Operations(TorchDispatchMode):
    """Counts operators, views apart."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def main() -> None:
    """Measure and print the result."""
    settings = read(Rounds(), sys.argv[1:])
    engine, mesh = build(settings)
    tokens = torch.randint(0, settings.vocabulary, (settings.batch, settings.seq + 1))
    batch = MicroBatch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()).to(mesh.device)
    share = Share([batch], passes=1, workers=mesh.layout.data_size)
    global_tokens = torch.tensor(float(settings.batch * settings.seq * mesh.layout.data_size), device=mesh.device)
    folder = tempfile.mkdtemp()
    guard = StepGuard(mesh, TrainerConfig(steps=1), Journal("tokens"), folder, Path(folder))

    def step(judges: bool) -> None:
        loss: StepLoss = engine.accumulate(share, global_tokens)
        norm = engine.gradient_norm()
        numbers = guard.judge(loss, norm, 1) if judges else {}
        Deferred({"loss": loss.mean, "grad_norm": norm, **numbers})
        engine.clip(1.0, norm)
        engine.update(3e-4, guard.skip if judges else None)
        engine.zero_grad()

    def wait() -> None:
        if mesh.device.type == "cuda":
            torch.cuda.synchronize()

    for number in range(settings.warmup):
        step(number % 2 == 0)
    times: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(settings.rounds):
        for judges in (False, True):
            step(judges)
            clock = Clock(mesh.device)
            for _ in range(settings.steps):
                step(judges)
                clock.tick()
            times[judges] += clock.seconds()
    with Operations() as operations:
        one = torch.ones((), dtype=torch.float64, device=mesh.device)
        guard.judge(StepLoss(one, one, {}, one), one, 1)

    fragments = list(engine.fragments())
    hashed: list[tuple[float, float]] = []
    for _ in range(4):
        wait()
        before, began = DeviceTimestamp(mesh.device), time.perf_counter()
        for fragment in fragments:
            hash_tensor(fragment.tensor)
        host, after = time.perf_counter() - began, DeviceTimestamp(mesh.device)
        hashed.append((after.seconds_since(before), host))
    device_seconds, host_seconds = hashed[-1]
    plain, judged = (1000 * statistics.median(times[judges]) for judges in (False, True))
    skipped = guard.skip.item()
    result = {
        "model": settings.model,
        "batch": settings.batch,
        "step_ms": round(plain, 3),
        "judged_step_ms": round(judged, 3),
        "spread_ms": [round(1000 * (max(each) - min(each)), 2) for each in times.values()],
        "judgement_operations": operations.count,
        "elements_hashed": sum(fragment.tensor.numel() for fragment in fragments),
        "hash_ms": round(1000 * device_seconds, 2),
        "hash_host_ms": round(1000 * host_seconds, 2),
        "cost_percent": round(100 * (judged - plain + 1000 * device_seconds / EVERY) / plain, 3),
        "skipped": skipped,
        "device": torch.cuda.get_device_name() if mesh.device.type == "cuda" else "cpu",
        "torch": torch.__version__,
    }
    if mesh.is_main:
        print(json.dumps(result), flush=True)
    engine.finish()
    mesh.close()


if __name__ == "__main__":
    main()
