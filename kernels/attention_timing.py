"""Time attention kernels when a run begins, on the shapes that it will compute.

PyTorch offers cuDNN's kernels and FlashAttention 2 in one switch; FlashAttention 4 is used where it is installed
(`flash4.py`). Which wins differs between GPUs, head widths and versions.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention, can_use_flash_attention
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import flash4
from .attention_blocks import Kernel
from .attention_op import attend
from .trial import survived

log = logging.getLogger(__name__)

KERNELS: tuple[Kernel, ...] = ("cudnn", "flash", "flash4")
SWITCH = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
"""The kernels that PyTorch's own operator offers."""

_WORTH = 0.97  # a kernel replaces an earlier one of KERNELS at this share of its time: noise shall not choose
_BUSY = 16_384  # positions timed at once, of several sequences if need be: of a short one the host's part would be timed, too
_REPEATS = 5
_WARM_UP = 0.2  # seconds: a GPU that idled, while a kernel was compiled, needs some to bring its clock up


@dataclass(frozen=True, repr=False)
class Shape:
    """Sizes of what one rank's attention computes of a sequence. window, softcap: as in `kernels.attention.Attend`."""

    seq_len: int
    heads: int
    kv_heads: int
    head_dim: int
    window: int | None = None
    softcap: float | None = None

    @property
    def is_plain(self) -> bool:
        """True if there is neither a window nor a soft-cap."""
        return self.window is None and self.softcap is None

    def __repr__(self) -> str:
        """Name what is set: measured times are remembered by this."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return f"Shape({', '.join(f'{name}={value}' for name, value in values.items() if value is not None)})"


def unsupported_reason(kernel: Kernel, shape: Shape, device: torch.device) -> str | None:
    """Return why a kernel can't compute a shape in bf16 on this machine, as far as its rules say; None if it should run.

    What rules say is the same at every start, unlike a failure: for PyTorch's kernels it is PyTorch who is asked.
    """
    if shape.softcap is not None and kernel != "flash4":
        return "it takes no soft-cap"
    if shape.window is not None and kernel == "cudnn":
        return "it takes no window here"
    if kernel == "flash4":
        if shape.head_dim % 8 or shape.head_dim > flash4.LARGEST_HEAD:
            return f"it takes head widths that are multiples of 8 up to {flash4.LARGEST_HEAD}, not {shape.head_dim}"
        return flash4.unsupported_reason()
    q, k, v = (positions_first.transpose(1, 2) for positions_first in _inputs(shape, device))
    asked = SDPAParams(q, k, v, None, 0.0, True, shape.heads != shape.kv_heads)
    takes = can_use_cudnn_attention(asked) if kernel == "cudnn" else can_use_flash_attention(asked)
    return None if takes else f"PyTorch says that it can't compute {shape} here"


def seconds(kernel: Kernel, shape: Shape, device: torch.device) -> float:
    """Measure the median time of a causal forward and backward pass over a sequence in bf16; infinite where that fails.

    Raises RuntimeError where a kernel's failure has left the GPU unusable.
    """
    samples = max(1, _BUSY // shape.seq_len)
    q, k, v = _inputs(shape, device, samples)
    gradient = torch.randn_like(q)

    def once() -> float:
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        torch.autograd.grad(_attend(kernel, shape, q, k, v), (q, k, v), gradient)
        stop.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(stop) / 1000

    try:
        once()  # compiles and loads
        begun = time.perf_counter()
        while time.perf_counter() - begun < _WARM_UP:
            once()
        return statistics.median(once() for _ in range(_REPEATS)) / samples
    except Exception as error:  # a kernel of another package may fail in any way
        survived(f"attention kernel {kernel}", error, device)
        log.warning("attention kernel %s can't run %s: %s", kernel, shape, error)
        return float("inf")


def flash4_compilations(shape: Shape) -> dict[str, Callable[[torch.device], object]]:
    """Return functions that make FlashAttention 4 compile its forward and its backward kernel for a shape, by name.

    They do nothing on a machine that it does not run on.
    """
    special: dict[str, Any] = {"left": None if shape.window is None else shape.window - 1, "softcap": shape.softcap}

    def forward(device: torch.device) -> object:
        if unsupported_reason("flash4", shape, device) is not None:
            return None
        q, k, v = (tensor.detach() for tensor in _inputs(shape, device))
        return flash4.forward(q, k, v, causal=True, scale=shape.head_dim**-0.5, **special)

    def backward(device: torch.device) -> object:
        if unsupported_reason("flash4", shape, device) is not None:
            return None
        q, k, v = (tensor.detach() for tensor in _inputs(shape, device))
        log_sum = q.new_zeros(1, shape.heads, shape.seq_len, dtype=torch.float32)
        return flash4.backward(q, q, k, v, q, log_sum, causal=True, scale=shape.head_dim**-0.5, **special)

    return {f"FlashAttention 4 {way.__name__}, {shape}": way for way in (forward, backward)}


def _inputs(shape: Shape, device: torch.device, samples: int = 1) -> list[torch.Tensor]:
    """Make queries, keys and values, positions first, as the projections leave them."""
    draw = torch.Generator(device).manual_seed(0)
    sizes = ((samples, shape.seq_len, heads, shape.head_dim) for heads in (shape.heads, shape.kv_heads, shape.kv_heads))
    return [torch.randn(size, device=device, dtype=torch.bfloat16, generator=draw).requires_grad_() for size in sizes]


def _attend(kernel: Kernel, shape: Shape, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    if not shape.is_plain:
        return attend(q, k, v, None, None, None, q.shape[-1] ** -0.5, shape.window, shape.softcap, kernel)[0]
    if kernel == "flash4":
        return flash4.flash4_attend(q, k, v, q.shape[-1] ** -0.5)[0]
    grouped = q.shape[2] != k.shape[2]
    with sdpa_kernel([SWITCH[kernel]]):
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=grouped
        )
    return out.transpose(1, 2)


def fastest(times: Mapping[Kernel, float]) -> Kernel:
    """Return the kernel to use, given the time that each takes."""
    best = KERNELS[0]
    for kernel in KERNELS:
        if times[kernel] < _WORTH * times[best]:
            best = kernel
    return best
