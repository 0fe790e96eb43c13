"""APOLLO, GaLore and natural GaLore: Adam's moments of a projection of each gradient, which is much smaller than the gradient.

A matrix's gradient is projected along its shorter side, from `columns` of the shorter side to `rank`: R (rank, longer side).
All state of a matrix is held by the rank that owns it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch

from .matrix import MatrixOptimizer
from .matrix_config import APOLLOConfig, GaLoreConfig, LowRankConfig, NaturalGaLoreConfig
from .parameters import Matrix, NamedParameter, Shards

EPS = 1e-8  # of APOLLO's ratios of norms


class _LowRank(MatrixOptimizer):
    """The moments of projected gradients. A subclass says how gradients are projected, and what the step is."""

    def __init__(self, config: LowRankConfig, parameters: Sequence[NamedParameter], shards: Shards) -> None:
        self._first, self._second = config.betas
        self._low_rank_eps, self._rank, self._interval = config.eps, config.rank, config.interval
        super().__init__(config, parameters, shards, lambda rows, columns: float(rows * columns))

    def update_matrix(self, matrix: Matrix, gradient: torch.Tensor) -> torch.Tensor:
        """Return the step, which is computed with the shorter side of the gradient first."""
        rows, columns = matrix.shape
        wide = gradient if rows <= columns else gradient.mT
        step = self.updates_taken(matrix)
        rank = min(self._rank, *matrix.shape)
        projection = self._projection(matrix, wide, rank, renewed=(step - 1) % self._interval == 0)
        low = self._preconditioned(matrix, projection.mT @ wide)
        mean, square = (self.owned_array(matrix, role, tuple(low.shape)) for role in ("low_avg", "low_avg_sq"))
        mean.lerp_(low, 1 - self._first)
        square.lerp_(low.square(), 1 - self._second)
        direction = mean / (square.sqrt() + self._low_rank_eps)
        update = self._step(matrix, wide, projection, low, direction)
        update = update * (math.sqrt(1 - self._second**step) / (1 - self._first**step))
        return update if rows <= columns else update.mT

    def _projection(self, matrix: Matrix, wide: torch.Tensor, rank: int, *, renewed: bool) -> torch.Tensor:
        """Return the projection (shorter side, rank)."""
        raise NotImplementedError

    def _preconditioned(self, matrix: Matrix, low: torch.Tensor) -> torch.Tensor:
        """Return what Adam's moments are of: the projected gradient itself."""
        return low

    def _step(
        self, matrix: Matrix, wide: torch.Tensor, projection: torch.Tensor, low: torch.Tensor, direction: torch.Tensor
    ) -> torch.Tensor:
        """Return the step (shorter side, longer side) from the gradient, its projection and Adam's direction of that."""
        raise NotImplementedError


class APOLLO(_LowRank):
    """The gradient itself, each column scaled as Adam would scale its random projection (Zhu et al., arXiv 2412.05270).

    s = ‖direction‖ / ‖projected‖, a number for each of the longer side's columns, or one for the matrix (`scaling=tensor`,
    which with `rank=1` is APOLLO-Mini);  the step is √scale · s · G, and grows by at most `growth` from one to the next (Fira).

    A projection is random, a function of (seed, name, number of the interval) alone, so nothing of it is saved.

    projections  matrix's name → number of the interval, projection: of this rank's matrices
    """

    def __init__(self, config: APOLLOConfig, parameters: Sequence[NamedParameter], shards: Shards) -> None:
        self._seed, self._scaling, self._growth = config.seed, config.scaling, config.growth
        self._scale = math.sqrt(config.scale)
        self.projections: dict[str, tuple[int, torch.Tensor]] = {}
        super().__init__(config, parameters, shards)

    def _projection(self, matrix: Matrix, wide: torch.Tensor, rank: int, *, renewed: bool) -> torch.Tensor:
        number = (self.updates_taken(matrix) - 1) // self._interval
        known = self.projections.get(matrix.name)
        if known is None or known[0] != number:
            known = number, drawn_projection(self._seed, matrix.name, number, wide.shape[0], rank).to(wide)
            self.projections[matrix.name] = known
        return known[1]

    def _step(
        self, matrix: Matrix, wide: torch.Tensor, projection: torch.Tensor, low: torch.Tensor, direction: torch.Tensor
    ) -> torch.Tensor:
        if self._scaling == "channel":
            update = wide * (direction.norm(dim=0) / (low.norm(dim=0) + EPS))
        else:
            update = wide * (direction.norm() / (low.norm() + EPS))
        before, norm = self.owned_array(matrix, "step_norm", (1,)), update.norm()
        limit = torch.where(before > 0, self._growth * before, math.inf)
        update = update * (limit / norm.clamp(min=1e-30)).clamp(max=1.0)
        before.copy_(torch.minimum(norm, limit))
        return update * self._scale


def drawn_projection(seed: int, name: str, number: int, side: int, rank: int) -> torch.Tensor:
    """Draw a Gaussian projection (side, rank) / √rank, on the host, by (seed, name, number) alone."""
    digest = hashlib.blake2b(f"{seed}/{name}/{number}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.randn(side, rank, generator=generator) / math.sqrt(rank)


class GaLore(_LowRank):
    """Adam in the subspace of the gradient's largest singular vectors (Zhao et al., arXiv 2403.03507).

    P: the left singular vectors of the gradient (shorter side first) every `interval` steps;  the step is scale · P · direction
    """

    def __init__(self, config: GaLoreConfig, parameters: Sequence[NamedParameter], shards: Shards) -> None:
        self._scale = config.scale
        super().__init__(config, parameters, shards)

    def _projection(self, matrix: Matrix, wide: torch.Tensor, rank: int, *, renewed: bool) -> torch.Tensor:
        held = self.owned_array(matrix, "subspace", (wide.shape[0], rank))
        if renewed:
            left, values, _ = torch.linalg.svd(wide, full_matrices=False)
            # Vectors of directions without gradients are arbitrary: rounding would choose them.
            kept = values[:rank] > values[0] * torch.finfo(values.dtype).eps * max(wide.shape)
            held.copy_(left[:, :rank] * kept)
        return held

    def _step(
        self, matrix: Matrix, wide: torch.Tensor, projection: torch.Tensor, low: torch.Tensor, direction: torch.Tensor
    ) -> torch.Tensor:
        return self._scale * (projection @ direction)


class NaturalGaLore(GaLore):
    """GaLore whose moments are of (λI + H·Hᵀ)⁻¹·g, a natural gradient (arXiv 2410.16029).

    g: the projected gradient, flattened;  the columns of H: the last `history` of them, with g;  λ: `fisher_damping`

    The inverse is computed by Woodbury's identity, with a matrix of history × history. H begins anew with each subspace,
    in which earlier gradients would mean something else.
    """

    def __init__(self, config: NaturalGaLoreConfig, parameters: Sequence[NamedParameter], shards: Shards) -> None:
        self._history, self._damping = config.history, config.fisher_damping
        super().__init__(config, parameters, shards)

    def _preconditioned(self, matrix: Matrix, low: torch.Tensor) -> torch.Tensor:
        past = self.owned_array(matrix, "history", (self._history, *low.shape))
        taken = (self.updates_taken(matrix) - 1) % self._interval
        if taken == 0:
            past.zero_()
        past[taken % self._history].copy_(low)
        rows_SK, g_K = past.flatten(1), low.flatten()
        gram_SS = torch.eye(self._history, dtype=low.dtype, device=low.device) + rows_SK @ rows_SK.mT / self._damping
        weights_S = torch.cholesky_solve((rows_SK @ g_K)[:, None], torch.linalg.cholesky_ex(gram_SS).L)[:, 0]
        return (low - (rows_SK.mT @ weights_S).view_as(low) / self._damping) / self._damping
