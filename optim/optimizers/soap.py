"""SOAP: Adam in the eigenbasis of Shampoo's preconditioner (Vyas et al., arXiv 2409.11321)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from .matrix import MatrixOptimizer
from .matrix_config import SOAPConfig
from .parameters import Matrix, NamedParameter, Shards


class SOAP(MatrixOptimizer):
    """Adam on gradients rotated by the eigenvectors of averages of G·Gᵀ and Gᵀ·G.

    L ← β₃·L + (1 − β₃)·G·Gᵀ;  R alike with Gᵀ·G;  G′ = Q_Lᵀ·G·Q_R;  M and V: Adam's moments of G and of G′;
    the step is Q_L·(Q_Lᵀ·M·Q_R / (√V + eps))·Q_Rᵀ, corrected for bias.

    Q_L and Q_R are the eigenvectors of L and R: at first by decomposition, then by a step of power iteration every `interval`.

    The first step only makes the bases. A side longer than `max_dim` is not rotated. All state of a matrix is held by the rank
    that owns it, and gradients travel in the masters' dtype.
    """

    def __init__(self, config: SOAPConfig, parameters: Sequence[NamedParameter], shards: Shards) -> None:
        self._first, self._second = config.betas
        self._shampoo = self._second if config.shampoo_beta is None else config.shampoo_beta
        self._soap_eps, self._interval = config.eps, config.interval
        self._max_dim, self._damping = config.max_dim, config.damping
        super().__init__(config, parameters, shards, self._cost)

    def _cost(self, rows: int, columns: int) -> float:
        """Count the multiplications of a turn of the bases, and of a step's rotations."""
        sides = [side for side in (rows, columns) if side <= self._max_dim]
        return float(sum(side**3 / self._interval + 4 * rows * columns * side for side in sides) + rows * columns)

    def update_matrix(self, matrix: Matrix, gradient: torch.Tensor) -> torch.Tensor:
        """Return the step of a matrix, and move its state."""
        step = self.updates_taken(matrix) - 1  # the first made the bases
        sides = [dim for dim in (0, 1) if matrix.shape[dim] <= self._max_dim]
        grams = {dim: gradient @ gradient.mT if dim == 0 else gradient.mT @ gradient for dim in sides}
        averages = {dim: self.owned_array(matrix, f"gram_{dim}", (matrix.shape[dim],) * 2) for dim in sides}
        bases = {dim: self.owned_array(matrix, f"basis_{dim}", (matrix.shape[dim],) * 2) for dim in sides}
        mean, square = (self.owned_array(matrix, role, matrix.shape) for role in ("exp_avg", "exp_avg_sq"))
        if step == 0:
            for dim in sides:
                averages[dim].lerp_(grams[dim], 1 - self._shampoo)
                if not averages[dim].any():  # no token has reached it, or a step makes the state that is then restored
                    bases[dim].copy_(torch.eye(len(bases[dim])))
                    continue
                bases[dim].copy_(torch.linalg.eigh(_damped(averages[dim], self._damping)).eigenvectors.flip(1))
            return torch.zeros_like(gradient)
        mean.lerp_(gradient, 1 - self._first)
        square.lerp_(_rotated(gradient, bases).square(), 1 - self._second)
        rotated = _rotated(mean, bases) / (square.sqrt() + self._soap_eps)
        update = _rotated(rotated, {dim: basis.mT for dim, basis in bases.items()})
        for dim in sides:
            averages[dim].lerp_(grams[dim], 1 - self._shampoo)
        if step % self._interval == 0:
            for dim in sides:
                _turn(bases[dim], _damped(averages[dim], self._damping), square, dim)
        return update * (math.sqrt(1 - self._second**step) / (1 - self._first**step))


def _rotated(matrix: torch.Tensor, bases: dict[int, torch.Tensor]) -> torch.Tensor:
    """Return Q_Lᵀ·matrix·Q_R, leaving out a side without a basis."""
    if 0 in bases:
        matrix = bases[0].mT @ matrix
    return matrix @ bases[1] if 1 in bases else matrix


def _damped(average: torch.Tensor, damping: float) -> torch.Tensor:
    """Add rising numbers to the diagonal, relative to its mean.

    The eigenvectors of a direction without gradients are arbitrary: without damping, rounding would choose them.
    """
    rising = torch.linspace(1, 2, len(average), dtype=average.dtype, device=average.device)
    return average + torch.diag(rising * (damping * average.diagonal().mean()))


def _turn(basis: torch.Tensor, average: torch.Tensor, square: torch.Tensor, dim: int) -> None:
    """Move a basis towards the eigenvectors of an average, the largest first, and sort the second moments with it."""
    product = average @ basis
    order = (basis * product).sum(0).argsort(descending=True)
    square.copy_(square.index_select(dim, order))
    basis.copy_(torch.linalg.qr(product.index_select(1, order)).Q)
