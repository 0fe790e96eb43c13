"""Causal attention on one rank: the plain version of the model's `attend(q, k, v, documents)` seam.

Shape legend: B batch, S sequence, H query heads, K key/value heads (H is a multiple of K), D head dim.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from itertools import pairwise
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.weak import WeakTensorKeyDictionary

from . import attention_blocks
from .attention_blocks import Segments, segments_backward, segments_forward
from .flash4 import flash4_attend

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
        out_BSHD, _ = attend_documents(
            q_BSHD, k_BSKD, v_BSKD, documents_BS, q_BSHD.shape[-1] ** -0.5 if scale is None else scale
        )
        return out_BSHD
    return _attend_causal(q_BSHD, k_BSKD, v_BSKD, scale)


def positions(documents_BS: torch.Tensor) -> torch.Tensor:
    """(B, S) int64: distance of each position from the start of its document, for position embeddings."""
    index_S = torch.arange(documents_BS.shape[1], device=documents_BS.device)
    starts_BS = torch.zeros_like(documents_BS, dtype=torch.int64)
    starts_BS[:, 1:] = torch.where(documents_BS[:, 1:] != documents_BS[:, :-1], index_S[1:], 0)
    return index_S - starts_BS.cummax(dim=1).values


def _attend_causal(q_BSHD: torch.Tensor, k_BSKD: torch.Tensor, v_BSKD: torch.Tensor, scale: float | None) -> torch.Tensor:
    if attention_blocks.kernel_for(q_BSHD) == "flash4":
        out_BSHD, _ = flash4_attend(q_BSHD, k_BSKD, v_BSKD, q_BSHD.shape[-1] ** -0.5 if scale is None else scale)
        return out_BSHD
    q_BHSD, k_BKSD, v_BKSD = q_BSHD.transpose(1, 2), k_BSKD.transpose(1, 2), v_BSKD.transpose(1, 2)
    grouped = q_BHSD.shape[1] != k_BKSD.shape[1]
    if q_BSHD.is_cuda:
        with sdpa_kernel(CUDA_BACKENDS, set_priority=True):
            out_BHSD = F.scaled_dot_product_attention(q_BHSD, k_BKSD, v_BKSD, is_causal=True, scale=scale, enable_gqa=grouped)
    else:
        out_BHSD = F.scaled_dot_product_attention(q_BHSD, k_BKSD, v_BKSD, is_causal=True, scale=scale, enable_gqa=grouped)
    return out_BHSD.transpose(1, 2)


_segments_of: MutableMapping[torch.Tensor, Segments] = WeakTensorKeyDictionary()


def segments_of(documents_BS: torch.Tensor) -> Segments:
    """The documents of all rows laid end to end; layers share the answer. Waits for the device where nobody has counted them.

    The tensor must not be written to afterwards.
    """
    if documents_BS not in _segments_of:
        _segments_of[documents_BS] = Segments.of_lengths(_lengths(documents_BS), documents_BS.device)
    return _segments_of[documents_BS]


def count_documents(documents_BS: torch.Tensor, on_host_BS: torch.Tensor) -> None:
    """Tell `segments_of` of a device's tensor what it would say, from the same tensor on the host: nothing is waited for."""
    _segments_of[documents_BS] = Segments.of_lengths(_lengths(on_host_BS), documents_BS.device)


def _lengths(documents_BS: torch.Tensor) -> list[int]:
    starts_BS = torch.ones_like(documents_BS, dtype=torch.bool)
    starts_BS[:, 1:] = documents_BS[:, 1:] != documents_BS[:, :-1]
    starts = starts_BS.flatten().nonzero().flatten().tolist()
    return [stop - start for start, stop in pairwise([*starts, documents_BS.numel()])]


# An operator of its own: the number of documents is not known to `torch.compile`, which therefore must not look inside, and
# selective activation checkpointing can keep its outputs by name.
@torch.library.custom_op("meshloom::attend_documents", mutates_args=())
def attend_documents(
    q_BSHD: torch.Tensor, k_BSKD: torch.Tensor, v_BSKD: torch.Tensor, documents_BS: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention inside each document: the output (B, S, H, D) and the log-sum-exp (1, H, B·S)."""
    q, k, v = map(_one_row, (q_BSHD, k_BSKD, v_BSKD))
    out_BTHD, lse_BHT = segments_forward(q, k, v, segments_of(documents_BS), scale=scale)
    return out_BTHD.reshape(q_BSHD.shape).contiguous(), lse_BHT


@torch.library.custom_op("meshloom::attend_documents_backward", mutates_args=())
def attend_documents_backward(
    dout_BSHD: torch.Tensor,
    q_BSHD: torch.Tensor,
    k_BSKD: torch.Tensor,
    v_BSKD: torch.Tensor,
    documents_BS: torch.Tensor,
    out_BSHD: torch.Tensor,
    lse_BHT: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients (dq, dk, dv) of `attend_documents`."""
    dout, q, k, v, out = map(_one_row, (dout_BSHD, q_BSHD, k_BSKD, v_BSKD, out_BSHD))
    dq, dk, dv = segments_backward(dout, q, k, v, out, lse_BHT, segments_of(documents_BS), scale=scale)
    return dq.reshape(q_BSHD.shape), dk.reshape(k_BSKD.shape), dv.reshape(v_BSKD.shape)


def _one_row(x_BSHD: torch.Tensor) -> torch.Tensor:
    return x_BSHD.reshape(1, -1, *x_BSHD.shape[2:])


def _shape_of_attend_documents(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape), q.new_empty(1, q.shape[2], documents.numel(), dtype=exact)


def _shape_of_backward(dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> Any:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)


def _differentiate(ctx: Any, dout_BSHD: torch.Tensor, dlse: torch.Tensor) -> Any:
    dq, dk, dv = attend_documents_backward(dout_BSHD, *ctx.saved_tensors, ctx.scale)
    return dq, dk, dv, None, None


attend_documents.register_fake(_shape_of_attend_documents)
attend_documents_backward.register_fake(_shape_of_backward)
attend_documents.register_autograd(_differentiate, setup_context=_keep)
