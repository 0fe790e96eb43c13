"""Causal attention on one rank: the plain version of the model's `attend(q, k, v, documents)` seam.

Shape legend: B batch, S sequence, H query heads, K key/value heads (H is a multiple of K), D head dim.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

CUDA_BACKENDS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Order in which kernels are tried on a GPU; the first that can run the given shapes and types does."""


class Attend(Protocol):
    """What a model calls where positions look at each other. Causal; never across documents when they are given."""

    def __call__(
        self,
        q_BSHD: torch.Tensor,
        k_BSKD: torch.Tensor,
        v_BSKD: torch.Tensor,
        documents_BS: torch.Tensor | None = None,
        *,
        scale: float | None = None,
    ) -> torch.Tensor:
        """The attention output, shaped as `q_BSHD`. `scale` multiplies the scores; None: 1/√D."""
        ...


def attend(
    q_BSHD: torch.Tensor,
    k_BSKD: torch.Tensor,
    v_BSKD: torch.Tensor,
    documents_BS: torch.Tensor | None = None,
    *,
    scale: float | None = None,
) -> torch.Tensor:
    """Causal grouped-query attention over whole sequences, each position within its document when `documents_BS` is given.

    A document is a run of equal values in a row of `documents_BS`. Returns (B, S, H, D).
    """
    if documents_BS is not None:
        return _attend_documents(q_BSHD, k_BSKD, v_BSKD, documents_BS, scale)  # pyright: ignore[reportCallIssue]
    return _attend_causal(q_BSHD, k_BSKD, v_BSKD, scale)


def positions(documents_BS: torch.Tensor) -> torch.Tensor:
    """(B, S) int64: distance of each position from the start of its document, for position embeddings."""
    index_S = torch.arange(documents_BS.shape[1], device=documents_BS.device)
    starts_BS = torch.zeros_like(documents_BS, dtype=torch.int64)
    starts_BS[:, 1:] = torch.where(documents_BS[:, 1:] != documents_BS[:, :-1], index_S[1:], 0)
    return index_S - starts_BS.cummax(dim=1).values


def _attend_causal(q_BSHD: torch.Tensor, k_BSKD: torch.Tensor, v_BSKD: torch.Tensor, scale: float | None) -> torch.Tensor:
    q_BHSD, k_BKSD, v_BKSD = q_BSHD.transpose(1, 2), k_BSKD.transpose(1, 2), v_BSKD.transpose(1, 2)
    grouped = q_BHSD.shape[1] != k_BKSD.shape[1]
    if q_BSHD.is_cuda:
        with sdpa_kernel(CUDA_BACKENDS, set_priority=True):
            out_BHSD = F.scaled_dot_product_attention(q_BHSD, k_BKSD, v_BKSD, is_causal=True, scale=scale, enable_gqa=grouped)
    else:
        out_BHSD = F.scaled_dot_product_attention(q_BHSD, k_BKSD, v_BKSD, is_causal=True, scale=scale, enable_gqa=grouped)
    return out_BHSD.transpose(1, 2)


def _document_lengths(documents_BS: torch.Tensor) -> torch.Tensor:
    """(documents,) int64: lengths of the documents of all rows laid end to end. Waits for the device."""
    rows_B1 = torch.arange(documents_BS.shape[0], device=documents_BS.device)[:, None]
    runs_BS2 = torch.stack((rows_B1.expand_as(documents_BS), documents_BS), dim=-1)
    return torch.unique_consecutive(runs_BS2.flatten(0, 1), dim=0, return_counts=True)[1]


@torch.compiler.disable
def _attend_documents(
    q_BSHD: torch.Tensor, k_BSKD: torch.Tensor, v_BSKD: torch.Tensor, documents_BS: torch.Tensor, scale: float | None
) -> torch.Tensor:
    lengths = _document_lengths(documents_BS)
    # Rows laid end to end: a document is a slice, whichever row it is in.
    q_THD, k_TKD, v_TKD = q_BSHD.flatten(0, 1), k_BSKD.flatten(0, 1), v_BSKD.flatten(0, 1)
    if q_BSHD.is_cuda:
        bounds = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        longest = int(lengths.max())
        # The operator behind `varlen_attn`; called itself because it takes grouped heads in every torch from 2.11 on.
        out_THD = torch.ops.aten._flash_attention_forward(
            q_THD, k_TKD, v_TKD, bounds, bounds, longest, longest, 0.0, True, False, scale=scale
        )[0]
        return out_THD.unflatten(0, q_BSHD.shape[:2])
    sizes: list[int] = lengths.tolist()
    pieces = [
        _attend_causal(q[None], k[None], v[None], scale)[0]
        for q, k, v in zip(q_THD.split(sizes), k_TKD.split(sizes), v_TKD.split(sizes), strict=True)
    ]
    return torch.cat(pieces).unflatten(0, q_BSHD.shape[:2])
