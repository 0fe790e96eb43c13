"""Which attention kernel is the fastest on this machine: measured when a run begins, on the shapes that it will compute.

PyTorch offers cuDNN's kernels and FlashAttention 2 in one switch, and lets FlashAttention 3 or 4 take the latter's place where
that package is installed (pip install flash-attn-4). Which wins differs between GPUs, head widths and versions.
"""

from __future__ import annotations

import importlib.util
import logging
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import attention, attention_kernels

log = logging.getLogger(__name__)

KERNELS: Mapping[attention_kernels.Kernel, SDPBackend] = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
}
NEWER_FLASH = {"FA4": "flash_attn.cute", "FA3": "flash_attn_interface"}
"""PyTorch's name of a FlashAttention that it can switch to, and the module that must be there."""

_WORTH = 0.97  # a kernel replaces an earlier one of KERNELS at this share of its time: noise shall not choose
_REPEATS = 5


@dataclass(frozen=True)
class Shape:
    """What one rank's attention sees of a sequence."""

    seq_len: int
    heads: int
    kv_heads: int
    head_dim: int


def use_newer_flash() -> str | None:
    """Put the newest FlashAttention that is installed in the place of PyTorch's own; its name, or None for PyTorch's own."""
    for name, module in NEWER_FLASH.items():
        if not _installed(module):
            continue
        try:
            from torch.nn.attention import activate_flash_attention_impl

            activate_flash_attention_impl(name)  # pyright: ignore[reportArgumentType]
            return name
        except Exception as error:  # a package that is not for this GPU or this PyTorch may fail in any way
            log.warning("%s is installed and can't be used: %s", name, error)
    return None


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package that it would be in
        return False


def use_own_flash() -> None:
    """Undo `use_newer_flash`."""
    from torch.nn.attention import restore_flash_attention_impl

    restore_flash_attention_impl()


def seconds(kernel: attention_kernels.Kernel, shape: Shape, device: torch.device) -> float:
    """Median time of a causal forward and backward pass in bf16; infinite where the kernel can't run the shape."""
    draw = torch.Generator(device).manual_seed(0)

    def random(heads: int) -> torch.Tensor:
        size = (1, shape.seq_len, heads, shape.head_dim)  # positions first, as the projections leave them
        return torch.randn(size, device=device, dtype=torch.bfloat16, generator=draw).transpose(1, 2)

    q, k, v = (random(heads).requires_grad_() for heads in (shape.heads, shape.kv_heads, shape.kv_heads))
    grouped = shape.heads != shape.kv_heads
    gradient = random(shape.heads)
    times: list[float] = []
    try:
        for _ in range(_REPEATS + 1):
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            with sdpa_kernel([KERNELS[kernel]]):
                out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
            torch.autograd.grad(out, (q, k, v), gradient)
            stop.record()
            torch.cuda.synchronize(device)
            times.append(start.elapsed_time(stop) / 1000)
    except Exception as error:  # a kernel of another package may fail in any way
        log.info("attention kernel %s can't run %s: %s", kernel, shape, error)
        return float("inf")
    return statistics.median(times[1:])  # the first also compiles and loads


def prefer(times: Mapping[attention_kernels.Kernel, float]) -> attention_kernels.Kernel:
    """The kernel for these times, and from now on the first that attention tries."""
    best: attention_kernels.Kernel = "cudnn"
    for kernel in KERNELS:
        if times[kernel] < _WORTH * times[best]:
            best = kernel
    first = KERNELS[best]
    attention.CUDA_BACKENDS.sort(key=lambda backend: backend is not first)
    attention_kernels.dense_kernel = best
    return best
