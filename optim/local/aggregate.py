"""Aggregation of the differences of islands into one: the coefficients of their sum.

`mean` weights each by the tokens that it was learned from. `geometric_median` bounds what an island can do whose differences
are wrong. With d_i the differences and w_i their shares of the tokens it is the point z of the least

    Σ_i w_i ‖z − d_i‖

as in RFA (Pillutla et al., arXiv 1912.13445). The sum is convex. An island pulls by its share, however far away it is, so those
that are wrong must have half of the tokens to move z without bound. Islands that agree as well with one another, and have
learned from as many tokens, get their mean. z is found by Weiszfeld's iteration, from z = Σ_i w_i d_i min(1, m / ‖d_i‖) on:

    w'_i ← w_i / max(‖z − d_i‖, 1e-5 m)        z ← Σ_i w'_i d_i / Σ_i w'_i

m is the lower median of the norms. The bound by it keeps weights finite where z is one of the d_i.

z is a combination of the d_i. So all of it follows from the Gram matrix of the d_i, which is a sum over the shards of ranks,
and the result is the same on every layout of an island.

The Flag Aggregator (arXiv 2302.05865) is not used. Differences of islands have small cosines in so many dimensions, and the
subspace that it finds then is that of one island, or of a few. Which ones is left to rounding, and signs count for nothing.
"""

from __future__ import annotations

import torch

ITERATIONS = 300
"""Always so many: a test of convergence could end one layout's iteration before another's."""
SMOOTHING = 1e-5


def mean_coefficients(tokens_K: torch.Tensor) -> torch.Tensor:
    """Return the share of each island in the mean, (K,), of the tokens that each has learned from."""
    return tokens_K / tokens_K.sum().clamp(min=1)


def median_coefficients(gram_KK: torch.Tensor, tokens_K: torch.Tensor) -> torch.Tensor:
    """Return the coefficients (K,) of the geometric median, whose sum is 1. All in float64.

    gram_KK: scalar products of the islands' differences. An island counts for nothing whose difference is not finite, or that
    has no tokens; where all do, coefficients are zero
    """
    squares_K = gram_KK.diagonal()
    counts_K = squares_K.isfinite() & (tokens_K > 0)
    found_K = torch.zeros_like(tokens_K)
    if not counts_K.any():
        return found_K
    gram_NN, squares_N, shares_N = gram_KK[counts_K][:, counts_K], squares_K[counts_K], mean_coefficients(tokens_K[counts_K])
    norms_N = squares_N.sqrt()
    length = norms_N.median().clamp(min=1e-100)  # the lower one; as long as nothing where most have learned nothing
    z_N = shares_N * (length / norms_N.clamp(min=length))
    for _ in range(ITERATIONS):
        along_N = gram_NN @ z_N
        distances_N = (squares_N - 2 * along_N + z_N @ along_N).clamp(min=0).sqrt()
        weights_N = shares_N / distances_N.clamp(min=SMOOTHING * length)
        z_N = weights_N / weights_N.sum()
    found_K[counts_K] = z_N
    return found_K
