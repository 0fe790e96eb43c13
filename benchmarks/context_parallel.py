"""Ring and Ulysses attention over all processes: held to attention on whole rows, then timed, forward and backward.

    torchrun --nproc-per-node 2 benchmarks/context_parallel.py --length 8192 --rows 4 --heads 32 --kv-heads 8 --dim 64
    torchrun --nproc-per-node 2 benchmarks/context_parallel.py            # tiny, for the CPU

On GPUs in bf16 over NCCL, otherwise in fp32 over gloo. "error" is the root mean square of the difference over that of the
whole rows' value, the worst of output and gradients over ranks; the run fails above 2 % (1e-5 in fp32). "whole" is one
process that holds everything, so that its milliseconds divided by the number of processes are the roof. TFLOP/s per process
count a causal mask as half: 7 · rows · heads · length² · dim for both passes.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist

from meshloom.data.batch import MicroBatch
from meshloom.kernels.attention import CausalAttention
from meshloom.kernels.attention_blocks import Kernel
from meshloom.kernels.documents import Documents
from meshloom.parallel.config import ParallelConfig
from meshloom.parallel.context.split import ContextParallel
from meshloom.parallel.layout import Layout
from meshloom.parallel.mesh import Mesh, environment_world_size, pick_device

Attention = Callable[[list[torch.Tensor]], torch.Tensor]


def milliseconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Mean time of a call, after two to warm up."""
    for _ in range(2):
        work()
    dist.barrier()
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats * 1e3


def with_gradients(attention: Attention, leaves: list[torch.Tensor], dout: torch.Tensor) -> list[torch.Tensor]:
    """Output and gradients."""
    out = attention(leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def packed(rows: int, length: int, mean: int) -> Documents:
    """Documents of exponentially distributed lengths, the same on every rank."""
    starts = torch.rand(rows, length, generator=torch.Generator().manual_seed(1)) < 1 / mean
    return Documents.of(starts.long().cumsum(1))


def main() -> int:
    """Print one row per kind of context parallelism; 1 if one of them is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--document", type=int, default=0, help="mean length of packed documents; 0: whole rows")
    parser.add_argument("--repeats", type=int, default=10)
    options = parser.parse_args()
    size = environment_world_size()
    device = pick_device()
    mesh = Mesh.connect(Layout.plan(ParallelConfig(cp=size), size), device)
    dtype, tolerance = (torch.bfloat16, 0.02) if device.type == "cuda" else (torch.float32, 1e-5)
    heads = (options.heads, options.kv_heads, options.kv_heads, options.heads)
    generator = torch.Generator(device).manual_seed(0)
    *whole, dout = (
        torch.randn(options.rows, options.length, count, options.dim, generator=generator, device=device).to(dtype)
        for count in heads
    )
    documents = packed(options.rows, options.length, options.document).to(device) if options.document else None
    rows = torch.arange(options.length, device=device).expand(options.rows, -1)

    def report(name: str, attention: Attention, leaves: list[torch.Tensor], dout: torch.Tensor, error: float) -> None:
        spent = milliseconds(lambda: with_gradients(attention, leaves, dout), device, options.repeats)
        worst = torch.tensor([spent, error], device=device)
        dist.all_reduce(worst, dist.ReduceOp.MAX)
        share = options.rows * options.heads * leaves[0].shape[1] * options.length * options.dim
        rate = "" if documents is not None else f"{7 * share / float(worst[0]) / 1e9:8.1f} TFLOP/s"
        if mesh.is_main:
            print(f"{name:>12} {float(worst[0]):9.2f} ms {rate}   error {float(worst[1]):.1e}", flush=True)
        wrong.append(not float(worst[1]) < tolerance)

    if mesh.is_main:
        what = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
        print(f"{size} × {what}, torch {torch.__version__}, {dtype}, {vars(options)}")
    wrong: list[bool] = []
    leaves = [x.clone().requires_grad_() for x in whole]

    def plain(x: list[torch.Tensor]) -> torch.Tensor:
        return CausalAttention()(x[0], x[1], x[2], documents)

    expected = with_gradients(plain, leaves, dout)
    report("whole", plain, leaves, dout, 0.0)
    kernels = ("cudnn", "flash") if device.type == "cuda" else ("cpu",)
    for kind, kernel in [*(("ring", kernel) for kernel in kernels), ("ulysses", "")]:
        if kind == "ulysses" and options.heads % size:
            continue
        chosen: Kernel = "flash" if kernel == "flash" else "cudnn"
        context = ContextParallel(mesh, kind, chosen)
        part = context.cut(MicroBatch(rows, rows, documents)).micro_batch
        mine = part.tokens_BS[0]
        leaves = [x[:, mine].clone().requires_grad_() for x in whole]

        def sliced(attend_slice: Callable[..., torch.Tensor], packed: Documents | None, x: list[torch.Tensor]) -> torch.Tensor:
            return attend_slice(x[0], x[1], x[2], packed)

        attention = partial(sliced, context, part.documents)
        errors = [
            float((got.float() - want[:, mine].float()).square().mean().sqrt() / want.float().square().mean().sqrt())
            for got, want in zip(with_gradients(attention, leaves, dout[:, mine]), expected, strict=True)
        ]
        report(f"{kind} {kernel}".strip(), attention, leaves, dout[:, mine], max(errors))
    mesh.close()
    return int(any(wrong))


if __name__ == "__main__":
    sys.exit(main())
