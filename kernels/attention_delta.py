"""The products of outputs' rows with their gradients, which are all that attention's backward pass needs of the output.

FlashAttention-2 (arXiv 2307.08691, 3.1.2) calls them delta: dS = P ∘ (dP − delta). Kernels compute them from output and
gradient. Code that has the delta alone gives them an output that has it.

Shape legend: B batch, Q queries, H heads, D head dim.
"""

from __future__ import annotations

import torch


def row_products(dout_BQHD: torch.Tensor, out_BQHD: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Compute delta, (B, H, Q), in this type."""
    return (dout_BQHD.to(dtype) * out_BQHD.to(dtype)).sum(-1).transpose(1, 2)


def output_with_delta(dout_BQHD: torch.Tensor, delta_BHQ: torch.Tensor) -> torch.Tensor:
    """Make the shortest output that has this delta: rows along the gradient's, in its type.

    It is rounded as the true output would be, and no row is longer than the true one: so it adds no larger error to delta.
    Norms are in fp64, where squares of small gradients in other types are not lost. Those in fp64 must lie within 1e-150 and
    1e150. A row whose gradient is zero has no delta.
    """
    norm_BQH1 = torch.linalg.vector_norm(dout_BQHD, dim=-1, keepdim=True, dtype=torch.float64)
    factor_BQH1 = delta_BHQ.transpose(1, 2).unsqueeze(-1) / norm_BQH1.square()
    factor_BQH1.masked_fill_(norm_BQH1 == 0, 0)
    return torch.mul(dout_BQHD, factor_BQH1, out=torch.empty_like(dout_BQHD))
