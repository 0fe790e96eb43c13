"""Attention of a ring member's own sequences, and of blocks between members, whose results are added up.

Shape legend: see `ring.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...kernels.attention_blocks import block_backward, block_forward, segments_backward, segments_forward
from .blocks import AttentionBlock
from .ring_call import RingCall


def own_forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: RingCall) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend inside this member's own sequences: the output (B, T, H, D) and the log-sum-exp (B, H, T)."""
    if q.shape[1] == 0:
        exact = torch.promote_types(q.dtype, torch.float32)
        return q.new_empty(q.shape), q.new_empty(q.shape[0], q.shape[2], 0, dtype=exact)
    if call.segments is not None:
        return segments_forward(q, k, v, call.segments, left=call.left, **call.how)
    spans = call.own_spans()
    found = [block_forward(q[:, at], k[:, at], v[:, at], causal=True, left=call.left, **call.how) for at in spans]
    if len(found) == 1:
        return found[0]
    return torch.cat([out for out, _ in found], dim=1), torch.cat([lse for _, lse in found], dim=2)


def own_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    call: RingCall,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute the gradients (dq, dk, dv) inside this member's own sequences; out and lse are of all keys."""
    if q.shape[1] == 0:
        return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    if call.segments is not None:
        return segments_backward(dout, q, k, v, out, lse, call.segments, left=call.left, **call.how)
    found = [
        block_backward(
            *(dout[:, at], q[:, at], k[:, at], v[:, at], out[:, at], lse[:, :, at]),
            causal=True,
            left=call.left,
            **call.how,
        )
        for at in call.own_spans()
    ]
    if len(found) == 1:
        return found[0]
    dq, dk, dv = (torch.cat([each[number] for each in found], dim=1) for number in range(3))
    return dq, dk, dv


def add_blocks(
    blocks: Sequence[AttentionBlock],
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    sums: tuple[torch.Tensor, torch.Tensor],
    call: RingCall,
) -> None:
    """Take blocks into the outputs and log-sum-exps of queries. tensors: q, keys, values; sums: out and lse."""
    (q, k, v), (out, lse) = tensors, sums
    for block in blocks:
        queries, keys = slice(*block.queries), slice(*block.keys)
        found = block_forward(q[:, queries], k[:, keys], v[:, keys], causal=False, left=block.left, **call.how)
        merge(out[:, queries], lse[:, :, queries], *found)


def add_gradients_of_blocks(
    blocks: Sequence[AttentionBlock],
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    sums: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    call: RingCall,
) -> None:
    """Add the gradients of blocks to those of queries, keys and values.

    tensors: dout, q, the keys and values met, out and lse; sums: of dq, dk and dv, shaped as q, keys and values.
    """
    (dout, q, k, v, out, lse), (dq, dk, dv) = tensors, sums
    for block in blocks:
        queries, keys = slice(*block.queries), slice(*block.keys)
        dq_part, dk_part, dv_part = block_backward(
            *(dout[:, queries], q[:, queries], k[:, keys], v[:, keys], out[:, queries], lse[:, :, queries]),
            causal=False,
            left=block.left,
            **call.how,
        )
        dq[:, queries] += dq_part
        dk[:, keys] += dk_part
        dv[:, keys] += dv_part


def merge(out: torch.Tensor, lse: torch.Tensor, found_out: torch.Tensor, found_lse: torch.Tensor) -> None:
    """Take the attention to more keys into (out, lse), in place: out moves by the found keys' share of the softmax."""
    share_BHQ = torch.sigmoid(found_lse - lse)
    out.lerp_(found_out.to(out.dtype), share_BHQ.transpose(1, 2).unsqueeze(-1))
    torch.logaddexp(lse, found_lse, out=lse)
