"""How the differences of islands become one: the coefficients of their sum.

`mean` weights each by the tokens that it was learned from. `flag` is the Flag Aggregator of Almasi et al. (arXiv 2302.05865):
it bounds what an island can do whose differences are wrong. With unit vectors x_i = d_i / ‖d_i‖ it finds the direction y that
is nearest to all of them, in the sense of

    min over ‖y‖ = 1 of Σ_i sqrt(1 − (y·x_i)²)

by reweighted least squares, from w = 1 on, until it stands:

    y ← the first left singular vector of [w_i x_i]        w_i ← (1 − (y·x_i)² + 1e-7)^(−1/4)

The rank is 1, as in the code that the authors released. The result is the projection of the mean of the x_i, by tokens, on y,
times the median of the norms, since lengths are lost with the x_i. An island that points elsewhere makes the step shorter, by
its share at most, and turns it little.

y is a combination of the x_i. So all of it follows from the Gram matrix of the d_i, which is a sum over the shards of ranks,
and the result is the same on every layout of an island.
"""

from __future__ import annotations

import math

import torch

ITERATIONS, REGULAR = 300, 1e-7
"""Iterations at most; of the reweighting, so that no weight is infinite."""
CONVERGED = 1e-13
"""Change of all (y·x_i)² below which iteration ends."""


def mean_coefficients(tokens_K: torch.Tensor) -> torch.Tensor:
    """Return the share of each island in the mean, (K,), of the tokens that each has learned from."""
    return tokens_K / tokens_K.sum().clamp(min=1)


def flag_coefficients(gram_KK: torch.Tensor, tokens_K: torch.Tensor) -> torch.Tensor:
    """Return the coefficients (K,) of the Flag Aggregator's sum. All in float64.

    gram_KK: scalar products of the islands' differences. An island counts for nothing whose difference is zero or not finite,
    or that has no tokens
    """
    norms_K = gram_KK.diagonal().sqrt()
    counts_K = norms_K.isfinite() & (norms_K > 0) & (tokens_K > 0)
    found_K = torch.zeros_like(tokens_K)
    if not counts_K.any():
        return found_K
    norms_N, shares_N = norms_K[counts_K], mean_coefficients(tokens_K[counts_K])
    cosines_NN = gram_KK[counts_K][:, counts_K] / torch.outer(norms_N, norms_N)
    y_N, along_N = _nearest_direction(cosines_NN, torch.ones_like(norms_N))
    for _ in range(ITERATIONS):
        before_N = along_N
        weights_N = ((1 - along_N.square()).clamp(min=0) + REGULAR) ** -0.25
        y_N, along_N = _nearest_direction(cosines_NN, weights_N)
        if torch.allclose(along_N.square(), before_N.square(), rtol=0, atol=CONVERGED):
            break
    found_K[counts_K] = norms_N.quantile(0.5) * (shares_N @ along_N) * y_N / norms_N
    return found_K


def _nearest_direction(cosines_NN: torch.Tensor, weights_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the first left singular vector y = Σ y_i x_i of [w_i x_i], as (y_i, y·x_i)."""
    values_N, vectors_NN = torch.linalg.eigh(cosines_NN * torch.outer(weights_N, weights_N))
    y_N = weights_N * vectors_NN[:, -1] / math.sqrt(float(values_N[-1]))  # largest: at least the mean of the squared weights
    return y_N, cosines_NN @ y_N
