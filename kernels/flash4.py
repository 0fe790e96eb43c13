"""FlashAttention 4's kernels for Hopper and Blackwell, where that package is installed: pip install 'meshloom[flash4]'.

PyTorch's own switch to them (`torch.nn.attention.activate_flash_attention_impl`) expects the package as it was when that
PyTorch came out, and fails with later ones. So its two functions are called here, behind operators that `torch.compile` does
not look into and that selective checkpointing can keep by name. It compiles a kernel when a shape's kind is first seen
(seconds), and keeps it on disk.

Shape legend: B batch, Q queries, T keys, S both, H query heads, K key/value heads (H is a multiple of K), D head dim.
"""

from __future__ import annotations

import functools
import os
from types import ModuleType
from typing import Any

import torch

LARGEST_HEAD = 128  # head dims that every GPU it knows takes, forward and backward


@functools.cache
def unsupported_reason() -> str | None:
    """Return why these kernels can't be used in this process; None if they can. Imports the package when first asked."""
    if not torch.cuda.is_available():
        return "there is no GPU"
    if torch.cuda.get_device_capability()[0] < 9:
        return "it needs a Hopper GPU or a later one"
    try:
        package()
    except Exception as error:  # not installed, or not for this Python, PyTorch or driver: it may fail in any way
        return f"{type(error).__name__}: {error}"
    return None


@functools.cache
def package() -> ModuleType:
    """Import FlashAttention 4: seconds, the first time. A package that is not for this machine may raise anything."""
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
    from flash_attn.cute import interface  # pyright: ignore[reportMissingImports]

    return interface  # pyright: ignore[reportUnknownVariableType]


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool,
    scale: float,
    cu_seqlens: torch.Tensor | None = None,
    longest: int | None = None,
    left: int | None = None,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the output, contiguous, and the log-sum-exp in fp32.

    (B, Q, H, D) on (B, T, K, D), with (B, H, Q) log-sum-exps; or with `cu_seqlens` (sequences + 1,) int32, sequences of at most
    `longest` laid end to end: (T, H, D) on (T, K, D), with (H, T). left, softcap: as in `attention_blocks.py`.
    """
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    how = _how(causal, scale, cu_seqlens, longest, left, softcap)
    out, log_sum, *_ = package()._flash_attn_fwd(q, k, v, return_lse=True, **how)
    return out, log_sum


def backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    log_sum: torch.Tensor,
    *,
    causal: bool,
    scale: float,
    cu_seqlens: torch.Tensor | None = None,
    longest: int | None = None,
    left: int | None = None,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute the gradients (dq, dk, dv), contiguous, for tensors shaped as in `forward`."""
    dout, q, k, v, out, log_sum = (tensor.contiguous() for tensor in (dout, q, k, v, out, log_sum))
    how = _how(causal, scale, cu_seqlens, longest, left, softcap)
    return package()._flash_attn_bwd(q, k, v, out, dout, log_sum, **how)


def _how(
    causal: bool,
    scale: float,
    cu_seqlens: torch.Tensor | None,
    longest: int | None,
    left: int | None,
    softcap: float | None,
) -> dict[str, Any]:
    """Name the arguments that both of the package's functions take: queries and keys are cut alike."""
    ends = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens, "max_seqlen_q": longest, "max_seqlen_k": longest}
    bounds = {"window_size_left": left, "window_size_right": 0 if causal and left is not None else None}
    return {"softmax_scale": scale, "causal": causal, "softcap": softcap or 0.0, **bounds, **ends}


@torch.library.custom_op("meshloom::flash4_attend", mutates_args=())
def flash4_attend(
    q_BSHD: torch.Tensor, k_BSKD: torch.Tensor, v_BSKD: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute causal attention over whole sequences: (B, S, H, D) and the log-sum-exp (B, H, S)."""
    return forward(q_BSHD, k_BSKD, v_BSKD, causal=True, scale=scale)


@torch.library.custom_op("meshloom::flash4_attend_backward", mutates_args=())
def flash4_attend_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    log_sum: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute the gradients (dq, dk, dv) of `flash4_attend`."""
    return backward(dout, q, k, v, out, log_sum, causal=True, scale=scale)


def _shape_of_output(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)


def _shape_of_gradients(dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> Any:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)


def _differentiate(ctx: Any, dout: torch.Tensor, dlog_sum: torch.Tensor) -> Any:
    return *flash4_attend_backward(dout, *ctx.saved_tensors, ctx.scale), None


flash4_attend.register_fake(_shape_of_output)
flash4_attend_backward.register_fake(_shape_of_gradients)
flash4_attend.register_autograd(_differentiate, setup_context=_keep)
