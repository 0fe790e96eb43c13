"""Attention sinks: a learned logit of each head that is in the softmax's sum and has no value (arXiv 2309.17453, gpt-oss).

They are added to what any kernel has computed, by its log-sum-exp. Output and log-sum-exp that hold them then give the right
gradients of queries, keys and values in the kernel's own backward pass: P = exp(S − LSE), dS = P ∘ (dP − rowsum(dO ∘ O)).

Shape legend: B batch, Q queries, H heads, D head dim.
"""

from __future__ import annotations

import torch

from .attention_delta import row_products


def share_without_sinks(lse_BHQ: torch.Tensor, sinks_H: torch.Tensor) -> torch.Tensor:
    """Return the share of the softmax that the keys keep, (B, Q, H, 1)."""
    return torch.sigmoid(lse_BHQ - sinks_H.to(lse_BHQ.dtype)[:, None]).transpose(1, 2).unsqueeze(-1)


def add_sinks(out_BQHD: torch.Tensor, lse_BHQ: torch.Tensor, sinks_H: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return output and log-sum-exp of the softmax with the sinks."""
    total_BHQ = torch.logaddexp(lse_BHQ, sinks_H.to(lse_BHQ.dtype)[:, None])
    return (out_BQHD * share_without_sinks(lse_BHQ, sinks_H)).to(out_BQHD.dtype), total_BHQ


def sinks_gradient(
    dout_BQHD: torch.Tensor, out_BQHD: torch.Tensor, lse_BHQ: torch.Tensor, sinks_H: torch.Tensor
) -> torch.Tensor:
    """Return the sinks' gradient, (H,). out, lse: with the sinks."""
    wide = lse_BHQ.dtype
    delta_BHQ = row_products(dout_BQHD, out_BQHD, wide)
    weights_BHQ = torch.exp(sinks_H.to(wide)[:, None] - lse_BHQ)
    return -(weights_BHQ * delta_BHQ).sum((0, 2)).to(sinks_H.dtype)
