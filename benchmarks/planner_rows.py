"""Measure the rows that predictions are scored on: calibrate this GPU, then time the engine's step of about 24 works.

    python benchmarks/planner_rows.py seconds=420 out=rows.json          one GPU
    python benchmarks/planner_rows.py cpu=1 seconds=100 out=rows.json    tiny sizes, to try the script
    python benchmarks/planner_score.py rows=rows.json                    scores them: half of them fit, the others are scored

Works are models of 0.3–8B by their width, with fewer layers where the GPU needs it, at 2,048 to 32,768 positions. They stand in
the order of what they tell, and none is begun after `seconds`, so that a cut loses the last ones. First three processes compile
works beside each other, each with one layer, for at most half of the time: what they compile is kept on disk. When they have
ended, one process takes it from there, builds each work and times it, and nothing else runs on the GPU or its host. It chooses
the attention kernels, too, and rows tell which: times that are taken beside other processes' work choose at random.
"""

# pyright: reportMissingImports=false, reportUnknownLambdaType=false, reportUnknownParameterType=false

from __future__ import annotations

import dataclasses
import gc
import importlib
import itertools
import json
import multiprocessing
import os
import queue
import statistics
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

from arguments import read

from meshloom.models.config import DecoderConfig
from meshloom.models.mixture.config import ExpertsConfig
from meshloom.planner.calibration import as_values
from meshloom.planner.cluster import ClusterConfig

WORKERS = 3
GRACE = 40
"""Seconds after the last begin of a work, when what still runs is ended."""
PROFILE = "planner_rows"


@dataclass
class Settings:
    """seconds: after which no work is begun; steps, warmup: of each work; only: number of works, 0 for all.

    profile: a cluster that was calibrated before; "": calibrate now
    """

    seconds: float = 420.0
    steps: int = 6
    warmup: int = 2
    only: int = 0
    cpu: int = 0
    profile: str = ""
    out: str = "rows.json"


@dataclass(frozen=True)
class Work:
    """A measured work. many: micro-batches of a step."""

    model: str
    layers: int
    seq: int
    micro: int
    many: int = 1
    policy: str = "none"
    float8: str = "none"
    compile: bool = True


SHAPES: dict[str, dict[str, Any]] = {
    "0.3B": {"dim": 1024, "heads": 16, "kv_heads": 8, "ffn_dim": 4096},
    "1B": {"dim": 2048, "heads": 32, "kv_heads": 8, "ffn_dim": 8192},
    "3B": {"dim": 3072, "heads": 24, "kv_heads": 8, "ffn_dim": 8192},
    "8B": {"dim": 4096, "heads": 32, "kv_heads": 8, "ffn_dim": 14336},
    "A": {
        "dim": 2048, "heads": 16, "kv_heads": 4, "head_dim": 128, "ffn_dim": 4096,
        "experts": {"count": 32, "top_k": 4, "ffn_dim": 1024},
    },
    "tiny": {"dim": 64, "heads": 4, "kv_heads": 2, "ffn_dim": 128},
    "tiny mixture": {"dim": 64, "heads": 4, "kv_heads": 2, "ffn_dim": 128, "experts": {"count": 4, "top_k": 2, "ffn_dim": 32}},
}  # fmt: skip
VOCABULARY = {"tiny": 512, "tiny mixture": 512}
USUAL_VOCABULARY = 128_256
SMALL_VOCABULARY = 512
"""Of the layer that is only compiled: no block depends on it, and three such heads would fill the GPU."""

WORKS = [
    Work("8B", 6, 8192, 2),
    Work("1B", 16, 8192, 4),
    Work("3B", 12, 8192, 2, policy="selective"),
    Work("A", 16, 8192, 2),
    Work("0.3B", 16, 2048, 16),
    Work("8B", 6, 8192, 2, policy="full"),
    Work("1B", 16, 32768, 1),
    Work("8B", 6, 8192, 2, float8="tensorwise"),
    Work("3B", 12, 4096, 2, many=2),
    Work("8B", 6, 2048, 4),
    Work("A", 16, 4096, 2, policy="selective"),
    Work("1B", 16, 8192, 1),
    Work("8B", 6, 32768, 1, policy="selective"),
    Work("3B", 12, 2048, 8),
    Work("0.3B", 16, 8192, 4),
    Work("1B", 16, 8192, 4, policy="selective"),
    Work("3B", 12, 32768, 1, policy="full"),
    Work("8B", 6, 8192, 1, many=4),
    Work("3B", 12, 8192, 2, float8="tensorwise"),
    Work("1B", 16, 2048, 8, policy="full"),
    Work("A", 16, 8192, 1, many=2, policy="full"),
    Work("0.3B", 16, 32768, 1),
    Work("8B", 6, 4096, 1),
    Work("0.3B", 16, 2048, 2),
]
TINY = [
    Work("tiny", 2, 128, 4, compile=False),
    Work("tiny mixture", 2, 128, 2, compile=False),
    Work("tiny", 3, 256, 2, policy="full", compile=False),
    Work("tiny", 2, 128, 2, many=2, policy="selective", compile=False),
]


def shape_of(work: Work) -> DecoderConfig:
    """Return the model of a work."""
    keys = dict(SHAPES[work.model])
    experts = ExpertsConfig(**keys.pop("experts")) if "experts" in keys else ExpertsConfig()
    vocabulary = VOCABULARY.get(work.model, USUAL_VOCABULARY)
    return DecoderConfig(layers=work.layers, vocabulary=vocabulary, tied=False, experts=experts, **keys)


class Bench:
    """Builds and runs works in this process."""

    def __init__(self, settings: Settings) -> None:
        import torch

        from meshloom.parallel.config import ParallelConfig
        from meshloom.parallel.layout import Layout
        from meshloom.parallel.mesh import Mesh

        self._settings = settings
        self._device = torch.device("cpu") if settings.cpu else torch.device("cuda", 0)
        self._precision = "fp32" if settings.cpu else "bf16"
        self._parallel = ParallelConfig(zero=1)
        self._mesh = Mesh.connect(Layout.plan(self._parallel, 1), self._device)

    def compile(self, work: Work) -> None:
        """Compile a work's block by one step of one layer. Kernels of an earlier work are forgotten."""
        import torch

        torch.compiler.reset()
        self._steps(replace(work, layers=1, many=1), replace(shape_of(work), layers=1, vocabulary=SMALL_VOCABULARY), 1)

    def measure(self, work: Work) -> dict[str, Any]:
        """Time a work whose block is compiled. Return its row."""
        import torch

        if not self._settings.cpu:
            torch.cuda.reset_peak_memory_stats()
        seconds, kernels = self._steps(work, shape_of(work), self._settings.warmup + self._settings.steps)
        timed = seconds[self._settings.warmup :]
        row = {**dataclasses.asdict(work), "seconds": statistics.median(timed), "least": min(timed), "most": max(timed)}
        row["tokens_per_s_gpu"] = work.micro * work.many * work.seq / row["seconds"]
        row |= kernels
        if not self._settings.cpu:
            row["allocated_gib"] = torch.cuda.max_memory_allocated() / 2**30
            row["reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
        return row

    def _steps(self, work: Work, shape: DecoderConfig, count: int) -> tuple[list[float], dict[str, bool | str]]:
        """Run steps of a work. Return their seconds, and which kernels computed it: fields of `planner.memory.Job`, and on a
        GPU attention's.
        """
        import torch

        from meshloom.kernels import swiglu
        from meshloom.kernels.experts import fused as experts
        from meshloom.models.decoder import Decoder
        from meshloom.models.mixture.balance_config import BalanceConfig
        from meshloom.optim.optimizers.adamw import AdamW
        from meshloom.optim.optimizers.config import AdamWConfig
        from meshloom.optim.optimizers.parameters import NamedParameter, Shards
        from meshloom.parallel.attention_choice import choose_attention
        from meshloom.parallel.division import divide_blocks
        from meshloom.parallel.engine import EngineSettings
        from meshloom.parallel.engines import make_engine
        from meshloom.parallel.policies import ActivationSettings, fused_experts_blocker, fused_swiglu_blocker
        from meshloom.trainer.device_timestamp import DeviceTimestamp

        def optimizer(parameters: Sequence[NamedParameter], shards: Shards) -> torch.optim.Optimizer:
            return AdamW(AdamWConfig(lr=3e-4, weight_decay=0.1), parameters, shards)

        with torch.device("meta"):
            model = Decoder(shape)
        settings = ActivationSettings(work.policy, None, self._precision, work.compile)
        policies, stages = divide_blocks(shape, work.layers, self._parallel, settings, work.seq)
        how = EngineSettings(
            policies=policies, stages=stages, seed=1, precision=self._precision, compile=work.compile, float8=work.float8,
            seq_len=work.seq, balance=BalanceConfig(),
        )  # fmt: skip
        kernels: dict[str, bool | str] = {
            "fused": fused_swiglu_blocker(shape, self._parallel, how) is None
            and swiglu.unsupported_reason(self._device) is None,
            "fused_experts": fused_experts_blocker(shape, self._parallel, how) is None
            and experts.unsupported_reason(self._device) is None,
        }
        engine = make_engine(model, self._mesh, optimizer, self._parallel, how)
        if not self._settings.cpu:  # as the engine chose, by what is remembered
            kernels["attention"] = choose_attention(shape, self._mesh, self._parallel, work.seq)
        share, tokens = self._share(work, shape.known_vocabulary)
        stamps = [DeviceTimestamp(self._device)]
        for _ in range(count):
            engine.accumulate(share, tokens)
            engine.clip(1.0, engine.gradient_norm())
            engine.update(3e-4)
            engine.zero_grad()
            stamps.append(DeviceTimestamp(self._device))
        seconds = [later.seconds_since(earlier) for earlier, later in itertools.pairwise(stamps)]
        engine.finish()
        del engine, model, share
        gc.collect()
        if not self._settings.cpu:
            torch.cuda.empty_cache()
        return seconds, kernels

    def _share(self, work: Work, vocabulary: int) -> tuple[Any, Any]:
        import torch

        from meshloom.data.assignment import Share
        from meshloom.data.batch import MicroBatch

        draw = torch.Generator().manual_seed(1)
        batches: list[MicroBatch] = []
        for _ in range(work.many):
            drawn = torch.randint(0, vocabulary, (work.micro, work.seq + 1), generator=draw)
            batches.append(MicroBatch(drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous()).to(self._device))
        count = torch.tensor(float(work.micro * work.many * work.seq), device=self._device)
        return Share(batches, passes=len(batches), workers=len(batches)), count


def compile_works(settings: Settings, works: Queue[Any], ready: Any, end: float) -> None:
    """Compile works until there are none, or the time is over. One that fails does so again where it is measured."""
    importlib.import_module("torch")  # before the calibration ends
    from meshloom.parallel import attention_choice

    attention_choice.remember = lambda record, work, times: None  # the measuring process times kernels alone
    ready.wait()
    bench = Bench(settings)
    while (work := works.get()) is not None and time.time() < end:
        try:
            bench.compile(work)
        except Exception:
            traceback.print_exc()
            gc.collect()


def measure_works(settings: Settings, works: Sequence[Work], rows: Queue[Any], end: float) -> None:
    """Measure works until the time is over. A work that fails says so in its row."""
    bench = Bench(settings)
    for work in works:
        if time.time() > end:
            break
        try:
            bench.compile(work)
            rows.put(bench.measure(work))
        except Exception as error:
            traceback.print_exc()
            rows.put({**dataclasses.asdict(work), "failed": f"{type(error).__name__}: {error}"[:500]})
            gc.collect()
    rows.put(None)


def calibrate(settings: Settings) -> tuple[ClusterConfig, float]:
    """Run `meshloom calibrate` in a process of its own. Return the profile, and the seconds that it took."""
    from meshloom.launch.calibrate import main as run
    from meshloom.planner.cluster import load_cluster

    began = time.time()
    if settings.profile:
        return load_cluster([f"cluster={settings.profile}"]), 0.0
    child = multiprocessing.get_context("spawn").Process(
        target=run, args=(["--as", PROFILE, *(["--cpu"] if settings.cpu else [])],)
    )
    child.start()
    child.join()
    if child.exitcode:
        raise SystemExit(f"meshloom calibrate ended with exit code {child.exitcode}")
    return load_cluster([f"cluster={PROFILE}"]), time.time() - began


def main(argv: Sequence[str]) -> None:
    """Calibrate, measure, and write rows as they come, so that what is cut short has written what it has."""
    settings = read(Settings(), argv)
    began = time.time()
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    context = multiprocessing.get_context("spawn")
    works, rows, ready = context.Queue(), context.Queue(), context.Event()
    listed = (TINY if settings.cpu else WORKS)[: settings.only or None]
    workers = 1 if settings.cpu else WORKERS
    for work in [*listed, *[None] * workers]:
        works.put(work)
    end = began + settings.seconds
    compilers = [
        context.Process(target=compile_works, args=(settings, works, ready, began + settings.seconds / 2))
        for _ in range(workers)
    ]
    for process in compilers:
        process.start()
    profile, seconds = calibrate(settings)
    print(f"calibrated in {seconds:.0f} s", flush=True)
    ready.set()
    for process in compilers:
        process.join()
    print(f"{time.time() - began:5.0f} s  compiled", flush=True)
    process = context.Process(target=measure_works, args=(settings, listed, rows, end))
    process.start()
    found: list[dict[str, Any]] = []
    while time.time() < end + GRACE:
        try:
            row = rows.get(timeout=5)
        except queue.Empty:
            if not process.is_alive():
                break
            continue
        if row is None:
            break
        found.append(row)
        print(f"{time.time() - began:5.0f} s  {json.dumps(row)}", flush=True)
        order = {dataclasses.astuple(work): at for at, work in enumerate(listed)}
        names = [field.name for field in dataclasses.fields(Work)]
        found.sort(key=lambda each: order[tuple(each[name] for name in names)])
        told = {"cluster": as_values(profile), "calibration_seconds": seconds, "rows": found}
        Path(settings.out).write_text(json.dumps(told, indent=1))
    process.join(10)
    process.kill()
    print(f"{len(found)} of {len(listed)} works in {time.time() - began:.0f} s: {settings.out}")


if __name__ == "__main__":
    main(sys.argv[1:])
