"""Our training step on DeepSpeed against raw DeepSpeed, and against our PyTorch engine: same model, batch and machine.

    python benchmarks/deepspeed_vs_raw.py model=1B batch=4 zero=1 rounds=2            # on all GPUs of this machine
    python benchmarks/deepspeed_vs_raw.py model=tiny batch=2 seq=64 vocabulary=512 compile=0 nproc=2 steps=4

Raw is what DeepSpeed's guide shows (`initialize`, `backward`, `step`) around the same blocks, with DeepSpeed's own clipping:
`raw` with DeepSpeed's own precisions (gradients in bf16), `raw-fp32` with ours (accumulated and reduced in fp32). It gets the
same fused AdamW, the attention kernel that is fastest here, compiled blocks, a resting garbage collector, and steps that are
timed by events on the device with no waiting between them, as ours.

Every variant is a process group of its own; they take turns, `rounds` times, the second time in reverse. Other arguments are
throughput.py's. Prints one JSON line for each run and a table: tokens/s/GPU (median of the rounds' medians, least and most of
them), peak memory, and the ratio to raw-fp32.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from arguments import read  # noqa: E402
from throughput import MODELS, Clock, Settings  # noqa: E402

from meshloom.kernels import attention_timing  # noqa: E402
from meshloom.kernels.attention import CausalAttention  # noqa: E402
from meshloom.models.config import DecoderConfig  # noqa: E402
from meshloom.models.decoder import Decoder  # noqa: E402
from meshloom.models.protocol import BlockKernels  # noqa: E402
from meshloom.parallel.deepspeed.setup import import_deepspeed  # noqa: E402

OURS = {"ours": "deepspeed", "torch": "torch"}
VARIANTS = (*OURS, "raw-fp32", "raw")
LIMIT = 120  # seconds for one run


@dataclasses.dataclass
class Comparison(Settings):
    """The settings of throughput.py, with the number of processes, the variants and the rounds to compare."""

    nproc: int = max(1, torch.cuda.device_count())
    variants: str = ",".join(VARIANTS)
    rounds: int = 2


def raw(settings: Settings, label: str) -> None:
    """The measurement of one raw variant, in the processes of torchrun."""
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    deepspeed = import_deepspeed(device.type)
    deepspeed.init_distributed("nccl" if device.type == "cuda" else "gloo")
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": settings.batch,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": settings.precision == "bf16"},
        "zero_optimization": {"stage": settings.zero},
        "zero_allow_untested_optimizer": True,
    }
    if label == "raw-fp32":
        config |= {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}
    dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
    with torch.device(device):
        model = Decoder(DecoderConfig(vocabulary=settings.vocabulary, **MODELS[settings.model])).to(dtype)  # type: ignore[arg-type]
    if device.type == "cuda" and settings.precision == "bf16":
        shape = attention_timing.Shape(settings.seq, model.config.heads, model.config.kv_heads, model.config.head_width)
        times = {kernel: attention_timing.seconds(kernel, shape, device) for kernel in attention_timing.KERNELS}
        attend = CausalAttention(attention_timing.fastest(times))
        model.use_kernels(dict.fromkeys(model.block_modules(), BlockKernels(attend)))
    if settings.compile:
        for block in model.layers.values():
            block.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)[0]
    draw = torch.Generator().manual_seed(int(os.environ["RANK"]))
    data = [torch.randint(0, settings.vocabulary, (settings.batch, settings.seq + 1), generator=draw) for _ in range(4)]
    batches = [(tokens[:, :-1].contiguous().to(device), tokens[:, 1:].contiguous().to(device)) for tokens in data]

    def step(number: int) -> None:
        tokens, targets = batches[number % len(batches)]
        loss = engine(tokens, targets) / targets.numel()
        engine.backward(loss)
        engine.step()

    for number in range(settings.warmup):
        step(number)
    gc.collect()
    gc.disable()
    if device.type == "cuda":
        torch.cuda.synchronize()
    clock = Clock(device)
    for number in range(settings.steps):
        step(number)
        clock.tick()
    seconds = clock.seconds()
    if os.environ["RANK"] == "0":
        tokens = settings.batch * settings.seq
        result = {
            "tokens_per_second_per_gpu": round(tokens / statistics.median(seconds)),
            "least": round(tokens / max(seconds)),
            "most": round(tokens / min(seconds)),
            "step_ms": round(1000 * statistics.median(seconds), 1),
            "memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1) if device.type == "cuda" else None,
        }
        print(json.dumps(result), flush=True)


def measure(variant: str, processes: int, arguments: list[str]) -> dict[str, Any] | None:
    """One run of a variant in processes of its own; None, and its last words on the screen, where it failed."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    if variant in OURS:
        command = [*start, str(HERE / "throughput.py"), f"engine={OURS[variant]}", *arguments]
    else:
        command = [*start, str(HERE / "deepspeed_vs_raw.py"), variant, *arguments]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        print(f"FAILED {variant}: it took longer than {LIMIT} s", flush=True)
        return None
    lines = [line for line in result.stdout.splitlines() if line.startswith("{")]
    if not lines:
        print(f"FAILED {variant}:\n{result.stderr[-2000:]}", flush=True)
        return None
    kept = ("tokens_per_second_per_gpu", "least", "most", "step_ms", "memory_gib")
    found = json.loads(lines[-1])
    row = {"variant": variant, **{key: found[key] for key in kept}}
    print(json.dumps(row), flush=True)
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """A line per variant: median of the rounds' medians, their spread, memory, and the ratio to raw-fp32."""
    rates = {name: [row["tokens_per_second_per_gpu"] for row in rows if row["variant"] == name] for name in VARIANTS}
    base = statistics.median(rates["raw-fp32"]) if rates["raw-fp32"] else None
    lines = [f"{'variant':<10}{'tokens/s/GPU':>14}{'rounds':>20}{'GiB':>8}{'ratio':>8}"]
    for name, values in rates.items():
        if values:
            middle = statistics.median(values)
            memory = max(row["memory_gib"] or 0.0 for row in rows if row["variant"] == name)
            ratio = f"{middle / base:.3f}" if base else "–"
            lines.append(f"{name:<10}{middle:>14.0f}{f'{min(values)}–{max(values)}':>20}{memory:>8.1f}{ratio:>8}")
    return "\n".join(lines)


def main() -> None:
    """Run every variant in turns, or (inside torchrun) one raw one."""
    if "RANK" in os.environ:
        label, *arguments = sys.argv[1:]
        raw(read(Settings(), arguments), label)
        return
    comparison = read(Comparison(), sys.argv[1:])
    shared = {field.name for field in dataclasses.fields(Settings)}
    arguments = [argument for argument in sys.argv[1:] if argument.partition("=")[0] in shared]
    names = comparison.variants.split(",")
    rows: list[dict[str, Any]] = []
    for number in range(comparison.rounds):
        for variant in reversed(names) if number % 2 else names:
            row = measure(variant, comparison.nproc, arguments)
            rows += [row] if row else []
    print(table(rows))


if __name__ == "__main__":
    main()
