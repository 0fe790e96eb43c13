"""Causal attention on one rank: the plain form of the model's `attend` seam, made for a kernel.

Shape legend: B batch, S sequence, H query heads, K key/value heads (H is a multiple of K), D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from .attention_blocks import Kernel, Segments, kernel_for, segments_backward, segments_forward
from .documents import Documents
from .flash4 import flash4_attend

_OTHERS = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
CUDA_BACKENDS: dict[Kernel, list[SDPBackend]] = {
    "cudnn": [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, *_OTHERS],
    "flash": [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, *_OTHERS],
    "flash4": [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, *_OTHERS],
}
"""Order in which PyTorch's own kernels are tried on a GPU, by the run's choice. The first that can run the given shapes and
types does."""


class Attend(Protocol):
    """Attention as a model calls it: causal, and never across documents when they are given."""

    def __call__(
        self,
        q_BSHD: torch.Tensor,
        k_BSKD: torch.Tensor,
        v_BSKD: torch.Tensor,
        documents: Documents | None = None,
        /,
        *,
        scale: float | None = None,
    ) -> torch.Tensor:
        """Return the attention output, shaped as `q_BSHD`. `scale` multiplies the scores; None: 1/√D."""
        ...


@dataclass(frozen=True)
class CausalAttention:
    """Causal grouped-query attention over whole sequences. Implements `Attend`.

    kernel  what computes it in half precision on a GPU; other types and devices have one kernel each
    """

    kernel: Kernel = "cudnn"

    def __call__(
        self,
        q_BSHD: torch.Tensor,
        k_BSKD: torch.Tensor,
        v_BSKD: torch.Tensor,
        documents: Documents | None = None,
        *,
        scale: float | None = None,
    ) -> torch.Tensor:
        """Attend to earlier positions, each within its document where documents are given. Returns (B, S, H, D)."""
        factor = q_BSHD.shape[-1] ** -0.5 if scale is None else scale
        if documents is not None:
            out_BSHD, _ = attend_documents(
                q_BSHD, k_BSKD, v_BSKD, documents.cu_seqlens, documents.host_cu_seqlens, factor, self.kernel
            )
            return out_BSHD
        if kernel_for(q_BSHD, self.kernel) == "flash4":
            out_BSHD, _ = flash4_attend(q_BSHD, k_BSKD, v_BSKD, factor)
            return out_BSHD
        q_BHSD, k_BKSD, v_BKSD = q_BSHD.transpose(1, 2), k_BSKD.transpose(1, 2), v_BSKD.transpose(1, 2)
        grouped = q_BHSD.shape[1] != k_BKSD.shape[1]
        if q_BSHD.is_cuda:
            with sdpa_kernel(CUDA_BACKENDS[self.kernel], set_priority=True):
                out_BHSD = F.scaled_dot_product_attention(
                    q_BHSD, k_BKSD, v_BKSD, is_causal=True, scale=scale, enable_gqa=grouped
                )
        else:
            out_BHSD = F.scaled_dot_product_attention(q_BHSD, k_BKSD, v_BKSD, is_causal=True, scale=scale, enable_gqa=grouped)
        return out_BHSD.transpose(1, 2)


# An operator of its own: selective activation checkpointing can keep its outputs by name, and `torch.compile` must not look
# inside, where the documents are counted on the host.
@torch.library.custom_op("meshloom::attend_documents", mutates_args=())
def attend_documents(
    q_BSHD: torch.Tensor,
    k_BSKD: torch.Tensor,
    v_BSKD: torch.Tensor,
    cu_seqlens: torch.Tensor,
    host_cu_seqlens: torch.Tensor,
    scale: float,
    kernel: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute causal attention inside each document: the output (B, S, H, D) and the log-sum-exp (1, H, B·S)."""
    q, k, v = map(_one_row, (q_BSHD, k_BSKD, v_BSKD))
    segments = Segments(cu_seqlens, host_cu_seqlens)
    out_BTHD, lse_BHT = segments_forward(q, k, v, segments, scale=scale, kernel=kernel)
    return out_BTHD.reshape(q_BSHD.shape).contiguous(), lse_BHT


@torch.library.custom_op("meshloom::attend_documents_backward", mutates_args=())
def attend_documents_backward(
    dout_BSHD: torch.Tensor,
    q_BSHD: torch.Tensor,
    k_BSKD: torch.Tensor,
    v_BSKD: torch.Tensor,
    cu_seqlens: torch.Tensor,
    host_cu_seqlens: torch.Tensor,
    out_BSHD: torch.Tensor,
    lse_BHT: torch.Tensor,
    scale: float,
    kernel: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute the gradients (dq, dk, dv) of `attend_documents`."""
    dout, q, k, v, out = map(_one_row, (dout_BSHD, q_BSHD, k_BSKD, v_BSKD, out_BSHD))
    segments = Segments(cu_seqlens, host_cu_seqlens)
    dq, dk, dv = segments_backward(dout, q, k, v, out, lse_BHT, segments, scale=scale, kernel=kernel)
    return dq.reshape(q_BSHD.shape), dk.reshape(k_BSKD.shape), dv.reshape(v_BSKD.shape)


def _one_row(x_BSHD: torch.Tensor) -> torch.Tensor:
    return x_BSHD.reshape(1, -1, *x_BSHD.shape[2:])


def _shape_of_attend_documents(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    accum = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape), q.new_empty(1, q.shape[2], q.shape[0] * q.shape[1], dtype=accum)


def _shape_of_backward(dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> Any:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, ctx.scale, ctx.kernel = inputs
    ctx.save_for_backward(*tensors, *output)


def _differentiate(ctx: Any, dout_BSHD: torch.Tensor, dlse: torch.Tensor) -> Any:
    gradients = attend_documents_backward(dout_BSHD, *ctx.saved_tensors, ctx.scale, ctx.kernel)
    return *gradients, None, None, None, None


attend_documents.register_fake(_shape_of_attend_documents)
attend_documents_backward.register_fake(_shape_of_backward)
attend_documents.register_autograd(_differentiate, setup_context=_keep)
