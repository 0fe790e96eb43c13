"""Time and peak memory of the loss, forward and backward: chunked against plain logits. Run it on one GPU.

    python benchmarks/loss_memory.py --tokens 32768 --dim 2048 --vocabulary 128256

"roof" is the time that the matmuls alone take (three products; tokens × dim × vocabulary multiply-adds each).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F

from meshloom.kernels.loss import linear_cross_entropy

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def plain(hidden_TD: torch.Tensor, head_VD: torch.Tensor, targets_T: torch.Tensor) -> torch.Tensor:
    """bf16 logits, softmax in fp32: what a trainer without a chunked loss does."""
    return F.cross_entropy((hidden_TD @ head_VD.t()).float(), targets_T, reduction="sum")


def milliseconds(work: Callable[[], object], repeats: int = 5) -> float:
    """Mean time of a call on the device, after two to warm up."""
    for _ in range(2):
        work()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(repeats):
        work()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / repeats


def main() -> None:
    """Print one row per form of the loss."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--chunks", type=int, nargs="*", default=[1024, 2048, 4096, 8192])
    options = parser.parse_args()
    tokens, dim, vocabulary = options.tokens, options.dim, options.vocabulary
    hidden = torch.randn(tokens, dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    head = (torch.randn(vocabulary, dim, device="cuda") * 0.02).bfloat16().requires_grad_()
    targets = torch.randint(0, vocabulary, (tokens,), device="cuda")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {tokens} tokens × {dim} × {vocabulary}, bf16")

    def matmuls() -> None:
        logits = torch.empty(4096, vocabulary, device="cuda", dtype=torch.bfloat16)
        for _ in range(tokens // 4096):
            torch.mm(hidden[:4096], head.t(), out=logits)
            torch.mm(logits, head)
            torch.mm(logits.t(), hidden[:4096])

    with torch.no_grad():
        print(f"{'roof':>16} {milliseconds(matmuls):8.1f} ms")

    losses: dict[str, Loss] = {"plain": plain, "plain, compiled": torch.compile(plain)}
    for chunk in options.chunks:
        losses[f"chunk {chunk}"] = lambda x, w, t, chunk=chunk: linear_cross_entropy(x, w, t, chunk=chunk)
    for name, loss in losses.items():

        def work(loss: Loss = loss) -> None:
            torch.autograd.grad(loss(hidden, head, targets), (hidden, head))

        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        try:
            time = milliseconds(work)
        except torch.OutOfMemoryError:
            print(f"{name:>16} out of memory")
            continue
        peak = (torch.cuda.max_memory_allocated() - before) / 2**30
        with torch.no_grad():
            forward = milliseconds(lambda loss=loss: loss(hidden, head, targets))
        print(f"{name:>16} {time:8.1f} ms {peak:8.2f} GiB    without gradients {forward:8.1f} ms")


if __name__ == "__main__":
    main()
