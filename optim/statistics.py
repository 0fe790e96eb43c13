"""The record of numbers a batch-size controller decides from. The engine fills it; nothing here knows a rank."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GradientStatistics:
    """Second moments of one step's gradient, measured before clipping.

    worker_square  mean over workers of ‖g_j‖², g_j the mean gradient of worker j's share (A in ALGORITHMS 1.2)
    batch_square   ‖g‖² of the whole batch's mean gradient (N)
    workers        number of workers J the shares were cut into
    worker_samples samples behind each g_j (m); the batch is workers × worker_samples
    """

    worker_square: float
    batch_square: float
    workers: int
    worker_samples: float
