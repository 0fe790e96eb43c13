"""Attention of one block of queries on one block of keys, forward and backward. Returns the log-sum-exp, too.

`scaled_dot_product_attention` does not return the log-sum-exp of a row's scores. Piecewise attention needs it to merge the
pieces of a row. The backward pass of a piece is a part of the whole one if it is given the whole row's output and log-sum-exp:
P = exp(S − LSE), dS = P ∘ (dP − rowsum(dO ∘ O)) (FlashAttention-2, arXiv 2307.08691, 3.1.2).

A block may be seen through a window (`left`): a query sees its own position and so many before it, where the last query and the
last key of the block are taken to lie at the same position. Scores may be capped (`softcap`): cap · tanh(score / cap).

Shape legend: B batch, Q queries, T keys, H query heads, K key/value heads (H is a multiple of K), D head dim.
"Half" is bfloat16 or float16. Log-sum-exps are fp32, or fp64 for fp64 inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch

from . import flash4

aten = torch.ops.aten

Kernel = Literal["cudnn", "flash", "flash4"]
"""Kernel for half precision on a GPU. cuDNN's is fast on Hopper; flash runs everywhere."""


@dataclass(frozen=True)
class Segments:
    """Packed sequences: laid end to end along one dim. Attention does not cross them.

    cu_seqlens  (sequences + 1,) int32 on the device: where each begins, and the end of the last; on_host: the same, on the host
    """

    cu_seqlens: torch.Tensor
    on_host: torch.Tensor

    @property
    def longest(self) -> int:
        """Length of the longest sequence."""
        return int(self.on_host.diff().max())

    def ranges(self) -> list[slice]:
        """The range of positions of each sequence."""
        return [slice(start, stop) for start, stop in pairwise(self.on_host.tolist())]


def block_forward(
    q_BQHD: torch.Tensor,
    k_BTKD: torch.Tensor,
    v_BTKD: torch.Tensor,
    *,
    causal: bool,
    scale: float,
    kernel: str,
    left: int | None = None,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend with every query to every key, or with `causal` (Q = T) on the keys up to its own.

    left, softcap: see the module; every query sees a key. Returns the output (B, Q, H, D) in the inputs' type and the
    log-sum-exp (B, H, Q).
    """
    assert not causal or q_BQHD.shape[1] == k_BTKD.shape[1], "a causal block is square"
    match kernel_for(q_BQHD, kernel, left, softcap):
        case "math":
            return _math_forward(q_BQHD, k_BTKD, v_BTKD, _Scores(causal, scale, left, softcap))
        case "flash":
            q_len, k_len = q_BQHD.shape[1], k_BTKD.shape[1]
            out_BQHD, lse_BHQ, *_ = aten._flash_attention_forward(
                *(q_BQHD, k_BTKD, v_BTKD, None, None, q_len, k_len, 0.0, causal, False),
                scale=scale,
                **_flash_window(left, causal),
            )
            return out_BQHD, lse_BHQ
        case "flash4":
            return flash4.forward(q_BQHD, k_BTKD, v_BTKD, causal=causal, scale=scale, left=left, softcap=softcap)
        case "cudnn":
            out_BHQD, lse_BHQ1, *_ = aten._scaled_dot_product_cudnn_attention(
                *_heads_first(q_BQHD, k_BTKD, v_BTKD), None, True, 0.0, causal, False, scale=scale
            )
            return out_BHQD.transpose(1, 2), lse_BHQ1.view(out_BHQD.shape[:3])
        case _:
            out_BHQD, lse_BHQ = aten._scaled_dot_product_flash_attention_for_cpu(
                *_heads_first(q_BQHD, k_BTKD, v_BTKD), 0.0, causal, scale=scale
            )
            return out_BHQD.transpose(1, 2), lse_BHQ


def block_backward(
    dout_BQHD: torch.Tensor,
    q_BQHD: torch.Tensor,
    k_BTKD: torch.Tensor,
    v_BTKD: torch.Tensor,
    out_BQHD: torch.Tensor,
    lse_BHQ: torch.Tensor,
    *,
    causal: bool,
    scale: float,
    kernel: str,
    left: int | None = None,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute this block's share of the gradients (dq, dk, dv), shaped as the inputs.

    out_BQHD, lse_BHQ: of the whole rows, that is merged over every block of keys, not only this one.
    """
    lse_BHQ = lse_BHQ.contiguous()
    match kernel_for(q_BQHD, kernel, left, softcap):
        case "math":
            scores = _Scores(causal, scale, left, softcap)
            return _math_backward(dout_BQHD, q_BQHD, k_BTKD, v_BTKD, out_BQHD, lse_BHQ, scores)
        case "flash":
            q_len, k_len = q_BQHD.shape[1], k_BTKD.shape[1]
            random_state, unused = _no_dropout(q_BQHD)
            return aten._flash_attention_backward(
                *(dout_BQHD.contiguous(), q_BQHD, k_BTKD, v_BTKD, out_BQHD, lse_BHQ, None, None, q_len, k_len),
                *(0.0, causal, random_state, unused),
                scale=scale,
                **_flash_window(left, causal),
            )
        case "flash4":
            tensors = (dout_BQHD, q_BQHD, k_BTKD, v_BTKD, out_BQHD, lse_BHQ)
            return flash4.backward(*tensors, causal=causal, scale=scale, left=left, softcap=softcap)
        case "cudnn":
            seed = torch.zeros((), dtype=torch.int64, device=q_BQHD.device)
            dout_BHQD, q_BHQD, k_BKTD, v_BKTD, out_BHQD = _heads_first(dout_BQHD, q_BQHD, k_BTKD, v_BTKD, out_BQHD)
            grads = aten._scaled_dot_product_cudnn_attention_backward(
                *(dout_BHQD, q_BHQD, k_BKTD, v_BKTD, out_BHQD, lse_BHQ.unsqueeze(-1), seed, seed, None, None, None),
                *(q_BQHD.shape[1], k_BTKD.shape[1], 0.0, causal),
                scale=scale,
            )
        case _:
            dout_BHQD, q_BHQD, k_BKTD, v_BKTD, out_BHQD = _heads_first(dout_BQHD, q_BQHD, k_BTKD, v_BTKD, out_BQHD)
            grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
                dout_BHQD, q_BHQD, k_BKTD, v_BKTD, out_BHQD, lse_BHQ, 0.0, causal, scale=scale
            )
    dq, dk, dv = (grad.transpose(1, 2) for grad in grads)
    return dq, dk, dv


def segments_forward(
    q_BTHD: torch.Tensor,
    k_BTKD: torch.Tensor,
    v_BTKD: torch.Tensor,
    segments: Segments,
    *,
    scale: float,
    kernel: str,
    left: int | None = None,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute causal attention inside each segment of the only row (B = 1): (1, T, H, D) and the log-sum-exp (1, H, T)."""
    assert q_BTHD.shape[0] == 1, "segments lie in one row"
    longest, cu_seqlens = segments.longest, segments.cu_seqlens
    computed_by = kernel_for(q_BTHD, kernel, left, softcap)
    if computed_by == "flash4":
        row = (q_BTHD[0], k_BTKD[0], v_BTKD[0])
        how: dict[str, Any] = {"cu_seqlens": cu_seqlens, "longest": longest, "left": left, "softcap": softcap}
        out_THD, lse_HT = flash4.forward(*row, causal=True, scale=scale, **how)
        return out_THD[None], lse_HT[None]
    if computed_by in ("flash", "cudnn"):
        out_THD, lse_HT, *_ = aten._flash_attention_forward(
            *(q_BTHD[0], k_BTKD[0], v_BTKD[0], cu_seqlens, cu_seqlens, longest, longest, 0.0, True, False),
            scale=scale,
            **_flash_window(left, causal=True),
        )
        return out_THD[None], lse_HT[None]
    out = torch.empty_like(q_BTHD)
    lse = q_BTHD.new_empty(1, q_BTHD.shape[2], q_BTHD.shape[1], dtype=_exact(q_BTHD))
    for at in segments.ranges():
        out[:, at], lse[:, :, at] = block_forward(
            *(q_BTHD[:, at], k_BTKD[:, at], v_BTKD[:, at]),
            causal=True,
            scale=scale,
            kernel=kernel,
            left=left,
            softcap=softcap,
        )
    return out, lse


def segments_backward(
    dout_BTHD: torch.Tensor,
    q_BTHD: torch.Tensor,
    k_BTKD: torch.Tensor,
    v_BTKD: torch.Tensor,
    out_BTHD: torch.Tensor,
    lse_BHT: torch.Tensor,
    segments: Segments,
    *,
    scale: float,
    kernel: str,
    left: int | None = None,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute the gradients (dq, dk, dv) of `segments_forward`; out and log-sum-exp of whole rows, as in `block_backward`."""
    longest, cu_seqlens = segments.longest, segments.cu_seqlens
    computed_by = kernel_for(q_BTHD, kernel, left, softcap)
    if computed_by == "flash4":
        row = (dout_BTHD[0], q_BTHD[0], k_BTKD[0], v_BTKD[0], out_BTHD[0], lse_BHT[0])
        how: dict[str, Any] = {"cu_seqlens": cu_seqlens, "longest": longest, "left": left, "softcap": softcap}
        grads = flash4.backward(*row, causal=True, scale=scale, **how)
        dq, dk, dv = (grad[None] for grad in grads)
        return dq, dk, dv
    if computed_by in ("flash", "cudnn"):
        random_state, unused = _no_dropout(q_BTHD)
        dq, dk, dv = aten._flash_attention_backward(
            *(dout_BTHD[0].contiguous(), q_BTHD[0], k_BTKD[0], v_BTKD[0], out_BTHD[0], lse_BHT[0].contiguous()),
            *(cu_seqlens, cu_seqlens, longest, longest, 0.0, True, random_state, unused),
            scale=scale,
            **_flash_window(left, causal=True),
        )
        return dq[None], dk[None], dv[None]
    dq, dk, dv = torch.empty_like(q_BTHD), torch.empty_like(k_BTKD), torch.empty_like(v_BTKD)
    for at in segments.ranges():
        q, k, v = q_BTHD[:, at], k_BTKD[:, at], v_BTKD[:, at]
        dq[:, at], dk[:, at], dv[:, at] = block_backward(
            *(dout_BTHD[:, at], q, k, v, out_BTHD[:, at], lse_BHT[:, :, at]),
            causal=True,
            scale=scale,
            kernel=kernel,
            left=left,
            softcap=softcap,
        )
    return dq, dk, dv


def kernel_for(q: torch.Tensor, chosen: str, left: int | None = None, softcap: float | None = None) -> str:
    """Choose the kernel for these queries: cpu, math, or where the GPU's fused kernels fit, the chosen one.

    They know half precision and head dims that are multiples of 8, most only up to 128. cuDNN's takes no window here, and
    only FlashAttention 4's a cap.
    """
    if q.device.type == "cpu":
        return "cpu" if left is None and softcap is None else "math"
    dim = q.shape[-1]
    if q.dtype not in (torch.bfloat16, torch.float16) or dim % 8 or dim > 256:
        return "math"
    fits_flash4 = dim <= flash4.LARGEST_HEAD
    if softcap is not None:
        return "flash4" if chosen == "flash4" and fits_flash4 else "math"
    if left is not None and chosen == "cudnn":
        return "flash"
    return chosen if fits_flash4 else "flash"


def _exact(q: torch.Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)


def _heads_first(*tensors_BSHD: torch.Tensor) -> list[torch.Tensor]:
    return [tensor.transpose(1, 2) for tensor in tensors_BSHD]


def _no_dropout(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Make the random state that flash's backward wants although it draws nothing."""
    return torch.zeros(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)


def _flash_window(left: int | None, causal: bool) -> dict[str, Any]:
    """Name the arguments of FlashAttention 2's window."""
    return {} if left is None else {"window_size_left": left, "window_size_right": 0 if causal else -1}


@dataclass(frozen=True)
class _Scores:
    """The rule of a block's scores; see the module."""

    causal: bool
    scale: float
    left: int | None
    softcap: float | None

    def of(self, q_BQHD: torch.Tensor, k_BTKD: torch.Tensor) -> torch.Tensor:
        """Compute them, (B, K, H/K, Q, T) in fp32 or fp64, −inf where a key is not seen."""
        exact = _exact(q_BQHD)
        q_BQKGD = q_BQHD.to(exact).unflatten(2, (k_BTKD.shape[2], -1))
        scores = torch.einsum("bqkgd,btkd->bkgqt", q_BQKGD, k_BTKD.to(exact)) * self.scale
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        queries, keys = scores.shape[-2:]
        if self.causal:
            later = torch.ones(queries, keys, dtype=torch.bool, device=scores.device).triu(1)
            scores.masked_fill_(later, -torch.inf)
        if self.left is not None:
            earlier = torch.ones(queries, keys, dtype=torch.bool, device=scores.device).tril(keys - queries - self.left - 1)
            scores.masked_fill_(earlier, -torch.inf)
        return scores

    def slope(self, scores: torch.Tensor) -> torch.Tensor | float:
        """Return the derivative of the scores of keys that are seen, with respect to the products of queries and keys."""
        if self.softcap is None:
            return self.scale
        seen = torch.where(scores.isinf(), 0, scores)
        return self.scale * (1 - (seen / self.softcap).square())


def _math_forward(
    q_BQHD: torch.Tensor, k_BTKD: torch.Tensor, v_BTKD: torch.Tensor, how: _Scores
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the formula itself, with all Q × T scores in memory: for types and head dims that no fused kernel takes."""
    scores = how.of(q_BQHD, k_BTKD)
    lse_BKGQ = scores.logsumexp(-1)
    weights = torch.exp(scores - lse_BKGQ[..., None])
    out = torch.einsum("bkgqt,btkd->bqkgd", weights, v_BTKD.to(weights.dtype))
    return out.flatten(2, 3).to(q_BQHD.dtype), lse_BKGQ.flatten(1, 2)


def _math_backward(
    dout_BQHD: torch.Tensor,
    q_BQHD: torch.Tensor,
    k_BTKD: torch.Tensor,
    v_BTKD: torch.Tensor,
    out_BQHD: torch.Tensor,
    lse_BHQ: torch.Tensor,
    how: _Scores,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    exact, kv_heads = _exact(q_BQHD), k_BTKD.shape[2]
    q, dout, out = (tensor.to(exact).unflatten(2, (kv_heads, -1)) for tensor in (q_BQHD, dout_BQHD, out_BQHD))
    k, v = k_BTKD.to(exact), v_BTKD.to(exact)
    scores = how.of(q_BQHD, k_BTKD)
    weights = torch.exp(scores - lse_BHQ.unflatten(1, (kv_heads, -1))[..., None])
    dv = torch.einsum("bkgqt,bqkgd->btkd", weights, dout)
    dweights = torch.einsum("bqkgd,btkd->bkgqt", dout, v)
    delta_BKGQ1 = (dout * out).sum(-1).permute(0, 2, 3, 1)[..., None]
    dscores = weights * (dweights - delta_BKGQ1) * how.slope(scores)
    dq = torch.einsum("bkgqt,btkd->bqkgd", dscores, k).flatten(2, 3)
    dk = torch.einsum("bkgqt,bqkgd->btkd", dscores, q)
    return dq.to(q_BQHD.dtype), dk.to(k_BTKD.dtype), dv.to(v_BTKD.dtype)
