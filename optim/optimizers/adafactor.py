"""Adafactor: a second moment of rows and one of columns in place of one per element (arXiv 1804.04235)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .matrix import MatrixOptimizer
from .matrix_config import AdafactorConfig
from .parameters import Matrix, NamedParameter, Shards


class Adafactor(MatrixOptimizer):
    """Second moments R·Cᵀ / mean(R) of matrices of blocks, with the decay 1 − t^`decay_power`, and clipped updates.

    u = g / max(√(R·Cᵀ / mean(R)), eps);  the step is u / max(1, RMS(u) / `clip`)

    R and C are averages of g² over rows and columns, as in `torch.optim.Adafactor`. There is no first moment. Rates are as the
    schedule says, not relative to the weights.
    """

    def __init__(self, config: AdafactorConfig, parameters: Sequence[NamedParameter], shards: Shards) -> None:
        self._power, self._clip, self._floor = config.decay_power, config.clip, config.eps
        super().__init__(config, parameters, shards, lambda rows, columns: float(rows * columns))

    def update_matrix(self, matrix: Matrix, gradient: torch.Tensor) -> torch.Tensor:
        """Return the step of a matrix, and move its state."""
        rows, columns = (
            self.owned_array(matrix, role, (size,)) for role, size in zip(("row", "column"), matrix.shape, strict=True)
        )
        weight = self.updates_taken(matrix) ** self._power
        squares = gradient.square()
        rows.lerp_(squares.mean(1), weight)
        columns.lerp_(squares.mean(0), weight)
        estimate = torch.outer(rows / rows.mean().clamp(min=self._floor), columns)
        update = gradient / estimate.clamp(min=self._floor**2).sqrt()
        return update / (update.norm() / update.numel() ** 0.5 / self._clip).clamp(min=1.0)
