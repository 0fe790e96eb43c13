"""Causal attention as one operator: inside documents, through a window, with capped scores and with sinks.

An operator of its own: selective activation checkpointing can keep its outputs by name, and `torch.compile` must not look
inside, where the documents are counted on the host.

Shape legend: B batch, S sequence, H query heads, K key/value heads (H is a multiple of K), D head dim, T = B·S positions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.library import CustomOpDef

from .attention_blocks import Segments, block_backward, block_forward, segments_backward, segments_forward
from .sinks import add_sinks, sinks_gradient


@torch.library.custom_op("meshloom::attend", mutates_args=())
def attend(
    q_BSHD: torch.Tensor,
    k_BSKD: torch.Tensor,
    v_BSKD: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    host_cu_seqlens: torch.Tensor | None,
    sinks_H: torch.Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
    kernel: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the output (B, S, H, D) and the log-sum-exp: (B, H, S), or with documents (1, H, T).

    cu_seqlens, host_cu_seqlens: of documents (`documents.Documents`); None: each row is one.
    """
    how: dict[str, Any] = {"scale": scale, "kernel": kernel, "left": None if window is None else window - 1, "softcap": softcap}
    if cu_seqlens is None or host_cu_seqlens is None:
        out, lse = block_forward(q_BSHD, k_BSKD, v_BSKD, causal=True, **how)
    else:
        q, k, v = map(_one_row, (q_BSHD, k_BSKD, v_BSKD))
        out, lse = segments_forward(q, k, v, Segments(cu_seqlens, host_cu_seqlens), **how)
    if sinks_H is not None:
        out, lse = add_sinks(out, lse, sinks_H)
    return out.reshape(q_BSHD.shape).contiguous(), lse.contiguous()


@torch.library.custom_op("meshloom::attend_backward", mutates_args=())
def attend_backward(
    dout_BSHD: torch.Tensor,
    q_BSHD: torch.Tensor,
    k_BSKD: torch.Tensor,
    v_BSKD: torch.Tensor,
    out_BSHD: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    host_cu_seqlens: torch.Tensor | None,
    sinks_H: torch.Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
    kernel: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute the gradients (dq, dk, dv, dsinks) of `attend`; the last is empty without sinks."""
    dout, q, k, v, out = dout_BSHD, q_BSHD, k_BSKD, v_BSKD, out_BSHD
    how: dict[str, Any] = {"scale": scale, "kernel": kernel, "left": None if window is None else window - 1, "softcap": softcap}
    if cu_seqlens is None or host_cu_seqlens is None:
        dq, dk, dv = block_backward(dout, q, k, v, out, lse, causal=True, **how)
    else:
        dout, q, k, v, out = map(_one_row, (dout, q, k, v, out))
        dq, dk, dv = segments_backward(dout, q, k, v, out, lse, Segments(cu_seqlens, host_cu_seqlens), **how)
    dsinks = lse.new_empty(0) if sinks_H is None else sinks_gradient(dout, out, lse, sinks_H)
    return (
        dq.reshape(q_BSHD.shape).contiguous(),
        dk.reshape(k_BSKD.shape).contiguous(),
        dv.reshape(v_BSKD.shape).contiguous(),
        dsinks,
    )


def _one_row(x_BSHD: torch.Tensor) -> torch.Tensor:
    return x_BSHD.reshape(1, -1, *x_BSHD.shape[2:])


def _shape_of_output(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor | None, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    rows, positions, heads = q.shape[:3]
    lse = (rows, heads, positions) if cu_seqlens is None else (1, heads, rows * positions)
    return q.new_empty(q.shape), q.new_empty(lse, dtype=wide)


def _shapes_of_gradients(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    host_cu_seqlens: torch.Tensor | None,
    sinks: torch.Tensor | None,
    *rest: Any,
) -> Any:
    dsinks = lse.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dsinks


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    q, k, v, cu_seqlens, host_cu_seqlens, sinks, *ctx.rest = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens, host_cu_seqlens, sinks)


def register_backward(forward: CustomOpDef, backward: CustomOpDef) -> None:
    """Register shapes and the gradient of an attention operator, whose arguments begin as those of `attend`.

    backward: takes the gradient of the output, q, k, v, the outputs, cu_seqlens, host_cu_seqlens, sinks, and the arguments of
    `forward` that follow those; it returns the gradients of q, k, v and of the sinks (empty without any)
    """

    def differentiate(ctx: Any, dout_BSHD: torch.Tensor, dlse: torch.Tensor) -> Any:
        saved = ctx.saved_tensors  # once: activation checkpointing allows no second time
        *gradients, dsinks = backward(dout_BSHD, *saved, *ctx.rest)
        return *gradients, None, None, None if saved[-1] is None else dsinks, *[None] * len(ctx.rest)

    forward.register_fake(_shape_of_output)
    backward.register_fake(_shapes_of_gradients)
    forward.register_autograd(differentiate, setup_context=_keep)


register_backward(attend, attend_backward)
