"""Gradient statistics: the numbers that a batch-size controller decides from. Nothing here knows a rank.

A *worker* has a mean gradient g_j over its part of the batch. It is a data-parallel rank, a micro-batch, or one micro-batch
of one rank. With tokens as weights, w_j = tokens of worker j / tokens of the batch (equal shares: 1/J):

    g = Σ_j w_j g_j        A = Σ_j w_j ‖g_j‖²        N = ‖g‖²        S = Σ_j w_j ⟨g_j, g⟩²

Workers may differ in size (the last micro-batch of a batch does). With w_j proportional to their samples, the estimates below
are unbiased, where m is the mean number of samples, b / J.

An engine has L_j = w_j g_j, the gradient of worker j's part of the loss divided by the tokens of the whole batch. So
A = Σ_j ‖L_j‖² / w_j: each worker adds one number, and no tensor is communicated. S needs the products of every worker's
gradient with the final g. Where a reduce-scatter is done as all-to-all and sum, each rank sees all J pieces of its shard
beside their mean, and the products are J numbers to add up over the shards.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class GradientStatistics:
    """Second moments of one step's gradient, measured before clipping.

    worker_square      A, the mean over workers of ‖g_j‖²
    batch_square       N = ‖g‖² of the whole batch's mean gradient
    workers            number of workers J the batch was cut into, at least 2
    worker_samples     samples behind each g_j (m), on average; the batch is workers × worker_samples
    projection_square  S, the mean over workers of ⟨g_j, g⟩²; None where the engine doesn't measure it
    """

    worker_square: float
    batch_square: float
    workers: int
    worker_samples: float
    projection_square: float | None = None

    @property
    def batch(self) -> float:
        """Samples of the batch, b = J m."""
        return self.workers * self.worker_samples

    @property
    def finite(self) -> bool:
        """Return whether every number is finite."""
        numbers = (self.worker_square, self.batch_square, self.projection_square or 0.0)
        return all(math.isfinite(number) for number in numbers)

    @property
    def _to_one_sample(self) -> float:
        """Factor m J / (J − 1) from the spread of workers' means, with divisor J, to the variance of a single sample."""
        assert self.workers >= 2, "the spread of one worker can't be told"
        return self.worker_samples * self.workers / (self.workers - 1)

    @property
    def spread(self) -> float:
        """Mean over workers of ‖g_j − g‖² = A − N."""
        return self.worker_square - self.batch_square

    @property
    def variance(self) -> float:
        """Trace of the covariance of a single sample's gradient, unbiased: (A − N) m J / (J − 1)."""
        return self.spread * self._to_one_sample

    @property
    def signal(self) -> float:
        """‖E g‖², unbiased: (b N − m A) / (b − m). Negative where noise exceeds it (McCandlish et al. A.1)."""
        m, b = self.worker_samples, self.batch
        return (b * self.batch_square - m * self.worker_square) / (b - m)

    @property
    def projection_variance(self) -> float:
        """Variance of ⟨g_i, g⟩ over single samples i: (S − N²) m J / (J − 1), as Σ_j w_j ⟨g_j, g⟩ = N."""
        assert self.projection_square is not None
        return (self.projection_square - self.batch_square**2) * self._to_one_sample

    @property
    def orthogonal_variance(self) -> float:
        """Trace of the covariance of single samples' gradients orthogonal to g: (A − S / N) m J / (J − 1)."""
        assert self.projection_square is not None
        along = self.projection_square / self.batch_square if self.batch_square else 0.0
        return (self.worker_square - along) * self._to_one_sample

    def metrics(self) -> dict[str, float]:
        """Return the statistics for a row of metrics.

        noise_scale is the simple noise scale tr Σ / ‖E g‖² in samples (McCandlish et al., arXiv 1812.06162), absent where
        the signal's estimate is not positive.
        """
        row = {"gradient_variance": self.variance, "gradient_norm_squared": self.signal}
        if self.signal > 0:
            row["noise_scale"] = self.variance / self.signal
        return row


class MovingMeans:
    """Exponential moving means of named numbers, corrected for their start: after one update the mean is the number.

    Take ratios of these means, and never average ratios: the mean of a ratio is biased.

    decay  weight of the past; at 0 only the newest measurement counts
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self._weight = 0.0
        self._sums: dict[str, float] = {}

    def update(self, numbers: Mapping[str, float]) -> None:
        """Take in one measurement, with the same names each time."""
        self._weight = self.decay * self._weight + (1 - self.decay)
        for name, number in numbers.items():
            self._sums[name] = self.decay * self._sums.get(name, 0.0) + (1 - self.decay) * number

    def __contains__(self, name: str) -> bool:
        return name in self._sums

    def __getitem__(self, name: str) -> float:
        return self._sums[name] / self._weight

    def state_dict(self) -> dict[str, float | dict[str, float]]:
        """Return the state as JSON values."""
        return {"weight": self._weight, "sums": dict(self._sums)}

    def load_state_dict(self, state: Mapping[str, float | Mapping[str, float]]) -> None:
        """Restore what `state_dict` returned."""
        weight, sums = state["weight"], state["sums"]
        assert isinstance(weight, int | float) and isinstance(sums, Mapping)
        self._weight, self._sums = float(weight), {name: float(number) for name, number in sums.items()}
