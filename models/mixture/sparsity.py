"""Objectives for sparse activation in runs of neighbouring tokens (BlockFFN, arXiv 2507.08771), as charges.

Locality asks that a token activate what the token before it does. With logits a, steepness s and p = sigmoid(s a), it is the
binary cross-entropy of p at a token to p at the next, a mean over experts. Chunk sparsity is the probability that a chunk of
tokens activates an expert, 1 - Π_k (1 - p_k), also a mean over experts.

As the balance losses, neither is computed: an operator adds its gradient in the backward pass. A pair counts if both of its
tokens do, and a chunk as often as it has tokens that do. So their sums, over the tokens of the global batch, do not depend on
how the batch is cut into micro-batches.

Shape legend: B sequences of S tokens, T = B·S, E experts, C chunks of L tokens in a sequence, the last of which may be shorter.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F


@torch.library.custom_op("meshloom::charge_locality", mutates_args=())
def charge_locality(logits_TE: torch.Tensor, rate: torch.Tensor, counted_BS: torch.Tensor, steepness: float) -> torch.Tensor:
    """Return the logits unchanged. The backward pass adds the gradient of `rate` times the sum over pairs."""
    return logits_TE.clone()


@charge_locality.register_fake
def _(logits_TE: torch.Tensor, rate: torch.Tensor, counted_BS: torch.Tensor, steepness: float) -> torch.Tensor:
    return torch.empty_like(logits_TE)


def _save_locality(ctx: Any, inputs: Any, output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.steepness = inputs[3]


def _locality_backward(ctx: Any, grad_TE: torch.Tensor) -> Any:
    logits_TE, rate, counted_BS = ctx.saved_tensors
    here, target, pairs = _pairs(logits_TE, counted_BS, ctx.steepness)
    factor = pairs * (rate * ctx.steepness / logits_TE.shape[1]).to(logits_TE.dtype)
    slope = grad_TE.new_zeros(*counted_BS.shape, logits_TE.shape[1])
    slope[:, :-1] += factor * (here.sigmoid() - target)
    slope[:, 1:] -= factor * here * target * (1 - target)
    return grad_TE + slope.view_as(grad_TE), None, None, None


charge_locality.register_autograd(_locality_backward, setup_context=_save_locality)


def locality_sum(logits_TE: torch.Tensor, counted_BS: torch.Tensor, steepness: float) -> torch.Tensor:
    """Compute the sum over pairs: a scalar in fp64."""
    here, target, pairs = _pairs(logits_TE, counted_BS, steepness)
    return ((F.softplus(here) - target * here) * pairs).mean(-1).sum(dtype=torch.float64)


def _pairs(
    logits_TE: torch.Tensor, counted_BS: torch.Tensor, steepness: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the steep logits of each token but the last, the probabilities of the one behind it, and whether both count."""
    steep_BSE = logits_TE.view(*counted_BS.shape, -1) * steepness
    pairs = (counted_BS[:, :-1] & counted_BS[:, 1:])[..., None].to(logits_TE.dtype)
    return steep_BSE[:, :-1], steep_BSE[:, 1:].sigmoid(), pairs


@torch.library.custom_op("meshloom::charge_chunks", mutates_args=())
def charge_chunks(p_TE: torch.Tensor, rate: torch.Tensor, counted_BS: torch.Tensor, length: int) -> torch.Tensor:
    """Return the probabilities unchanged. The backward pass adds the gradient of `rate` times the sum over chunks."""
    return p_TE.clone()


@charge_chunks.register_fake
def _(p_TE: torch.Tensor, rate: torch.Tensor, counted_BS: torch.Tensor, length: int) -> torch.Tensor:
    return torch.empty_like(p_TE)


def _save_chunks(ctx: Any, inputs: Any, output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.length = inputs[3]


def _chunks_backward(ctx: Any, grad_TE: torch.Tensor) -> Any:
    p_TE, rate, counted_BS = ctx.saved_tensors
    length = ctx.length
    unused_BCLE, counted_BCL1 = _chunks(p_TE, counted_BS, length)
    # Of all other tokens of the chunk: a quotient would be 0 / 0 where a probability is 1.
    one = torch.ones_like(unused_BCLE[:, :, :1])
    before = torch.cat([one, unused_BCLE[:, :, :-1]], 2).cumprod(2)
    behind = torch.cat([unused_BCLE[:, :, 1:], one], 2).flip(2).cumprod(2).flip(2)
    weight_BC11 = counted_BCL1.sum(2, keepdim=True) * (rate / p_TE.shape[1]).to(p_TE.dtype)
    slope = (weight_BC11 * before * behind * counted_BCL1).flatten(1, 2)[:, : counted_BS.shape[1]]
    return grad_TE + slope.reshape_as(grad_TE), None, None, None


charge_chunks.register_autograd(_chunks_backward, setup_context=_save_chunks)


def chunk_sum(p_TE: torch.Tensor, counted_BS: torch.Tensor, length: int) -> torch.Tensor:
    """Compute the sum over chunks: a scalar in fp64. With p of 0 or 1 it counts the experts that a chunk activates."""
    unused_BCLE, counted_BCL1 = _chunks(p_TE, counted_BS, length)
    used_BC = (1 - unused_BCLE.prod(2)).mean(-1)
    return (used_BC * counted_BCL1.sum((2, 3))).sum(dtype=torch.float64)


def _chunks(p_TE: torch.Tensor, counted_BS: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return 1 - p by chunk, 1 for a token that does not count, and whether each token does."""
    batch, size = counted_BS.shape
    missing = -size % length
    counted = F.pad(counted_BS.to(p_TE.dtype), (0, missing)).view(batch, -1, length, 1)
    p_BCLE = F.pad(p_TE.view(batch, size, -1), (0, 0, 0, missing)).view(batch, -1, length, p_TE.shape[1])
    return 1 - p_BCLE * counted, counted
