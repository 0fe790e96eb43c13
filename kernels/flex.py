"""Attention with capped scores by PyTorch's flex attention, where no ready kernel takes them: head widths above 128, or no
FlashAttention 4 on the machine.

The compiler makes the kernels. They keep no scores, as ready ones, and skip blocks that nobody sees.

Shape legend: B batch, S sequence, H query heads, K key/value heads (H is a multiple of K), D head dim.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from .documents import Documents
from .sinks import share_without_sinks

Flex = Callable[..., Any]


@functools.cache
def compiled() -> Flex:
    """Return flex attention as fused kernels: without the compiler it keeps all scores in memory."""
    return torch.compile(flex_attention, dynamic=False)


def flex_attend(
    q_BSHD: torch.Tensor,
    k_BSKD: torch.Tensor,
    v_BSKD: torch.Tensor,
    documents: Documents | None,
    *,
    scale: float,
    window: int | None,
    softcap: float,
    sinks: torch.Tensor | None,
    flex: Flex,
) -> torch.Tensor:
    """Attend as `kernels.attention.Attend` says. flex: `compiled()`, or the plain function."""
    q_BHSD, k_BKSD, v_BKSD = (x.transpose(1, 2) for x in (q_BSHD, k_BSKD, v_BSKD))

    def cap(score: torch.Tensor, *_place: torch.Tensor) -> torch.Tensor:
        return softcap * torch.tanh(score / softcap)

    out_BHSD, lse_BHS = flex(
        *(q_BHSD, k_BKSD, v_BKSD),
        score_mod=cap,
        block_mask=_mask(q_BSHD, documents, window),
        scale=scale,
        enable_gqa=q_BHSD.shape[1] != k_BKSD.shape[1],
        return_lse=True,
    )
    out_BSHD = out_BHSD.transpose(1, 2)
    return out_BSHD if sinks is None else (out_BSHD * share_without_sinks(lse_BHS, sinks)).to(out_BSHD.dtype)


def _mask(q_BSHD: torch.Tensor, documents: Documents | None, window: int | None) -> BlockMask:
    """Say which keys a query sees: those up to its own, within its document and the window."""
    length = q_BSHD.shape[1]
    ids_BS = None if documents is None else documents.ids_BS

    def sees(b: torch.Tensor, h: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        seen = query >= key
        if window is not None:
            seen = seen & (query - key < window)
        return seen if ids_BS is None else seen & (ids_BS[b, query] == ids_BS[b, key])

    batch: Any = None if ids_BS is None else q_BSHD.shape[0]
    heads: Any = None
    return create_block_mask(sees, batch, heads, length, length, device=str(q_BSHD.device))
