"""Our training step on DeepSpeed against raw DeepSpeed, and against our PyTorch engine: same model, batch and machine.

    python benchmarks/deepspeed_vs_raw.py model=1B batch=4 zero=1            # on all GPUs of this machine
    python benchmarks/deepspeed_vs_raw.py model=tiny batch=2 seq=64 vocabulary=512 compile=0 nproc=2

Raw is what DeepSpeed's guide shows (`initialize`, `backward`, `step`) around the same blocks, with DeepSpeed's own clipping,
once with DeepSpeed's default precisions (gradients in bf16) and once with ours (accumulated and reduced in fp32). Every
variant is a process group of its own. Prints one JSON line each: tokens/s/GPU (median of the timed steps), peak memory.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from throughput import MODELS, Settings  # noqa: E402

from meshloom.models.llama import Llama  # noqa: E402
from meshloom.parallel.deepspeed.setup import import_deepspeed  # noqa: E402

OURS = ("deepspeed", "torch")
RAW = ("raw", "raw-fp32-gradients")


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
    if label == "raw-fp32-gradients":
        config |= {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}
    dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
    with torch.device(device):
        model = Llama(vocabulary=settings.vocabulary, **MODELS[settings.model]).to(dtype)  # type: ignore[arg-type]
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
    seconds: list[float] = []
    for number in range(settings.steps):
        _wait(device)
        began = time.perf_counter()
        step(number)
        _wait(device)
        seconds.append(time.perf_counter() - began)
    if os.environ["RANK"] == "0":
        peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
        rate = settings.batch * settings.seq / statistics.median(seconds)
        print(
            json.dumps({"label": label, "tokens_per_second_per_gpu": round(rate, 1), "memory_gib": round(peak, 2)}), flush=True
        )


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    """Run every variant, or (inside torchrun) one raw one."""
    if "RANK" in os.environ:
        label, *arguments = sys.argv[1:]
        raw(Settings.parse(arguments), label)
        return
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith(("nproc=", "variants="))]
    chosen = dict(argument.split("=", 1) for argument in sys.argv[1:])
    processes = chosen.get("nproc", str(max(1, torch.cuda.device_count())))
    for variant in chosen.get("variants", ",".join((*OURS, *RAW))).split(","):
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
        if variant in OURS:
            command = [*start, str(HERE / "throughput.py"), f"engine={variant}", f"label=ours on {variant}", *arguments]
        else:
            command = [*start, str(HERE / "deepspeed_vs_raw.py"), variant, *arguments]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        lines = [line for line in result.stdout.splitlines() if line.startswith("{")]
        print("\n".join(lines) or f"{variant} failed:\n{result.stderr[-2000:]}", flush=True)


if __name__ == "__main__":
    main()
