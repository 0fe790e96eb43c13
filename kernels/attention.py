"""Causal attention on one rank: the plain form of the model's `attend` seam, made for a kernel.

Shape legend: B batch, S sequence, H query heads, K key/value heads (H is a multiple of K), D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from .attention_blocks import Kernel, kernel_for
from .attention_op import attend
from .documents import Documents
from .flash4 import flash4_attend
from .flex import compiled, flex_attend

_OTHERS = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
CUDA_BACKENDS: dict[Kernel, list[SDPBackend]] = {
    "cudnn": [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, *_OTHERS],
    "flash": [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, *_OTHERS],
    "flash4": [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, *_OTHERS],
}
"""Order in which PyTorch's own kernels are tried on a GPU, by the run's choice. The first that can run the given shapes and
types does."""


def needs_flex(q: torch.Tensor, kernel: Kernel, softcap: float) -> bool:
    """Return whether no ready kernel computes capped scores of these queries, in half precision on a GPU."""
    half = q.dtype in (torch.bfloat16, torch.float16)
    return q.is_cuda and half and kernel_for(q, kernel, softcap=softcap) == "math"


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
        window: int | None = None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the attention output, shaped as `q_BSHD`.

        scale    multiplies the scores; None: 1/√D
        window   positions that a query sees, its own included; None: all before it
        softcap  scores become cap · tanh(score / cap)
        sinks    (H,) logits in the softmax's sum (`sinks.py`)
        """
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
        window: int | None = None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend to earlier positions, each within its document where documents are given. Returns (B, S, H, D)."""
        factor = q_BSHD.shape[-1] ** -0.5 if scale is None else scale
        if window is not None and window >= q_BSHD.shape[1]:
            window = None
        if softcap is not None and needs_flex(q_BSHD, self.kernel, softcap):
            how: dict[str, Any] = {"scale": factor, "window": window, "softcap": softcap, "sinks": sinks}
            return flex_attend(q_BSHD, k_BSKD, v_BSKD, documents, **how, flex=compiled())
        if documents is not None or window is not None or softcap is not None or sinks is not None:
            ends = (None, None) if documents is None else (documents.cu_seqlens, documents.host_cu_seqlens)
            out_BSHD, _ = attend(q_BSHD, k_BSKD, v_BSKD, *ends, sinks, factor, window, softcap, self.kernel)
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
