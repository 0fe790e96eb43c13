"""Coupling of the learning rate to a batch size that changes during a run: a factor on the schedule's rate.

With a batch of B samples and a noise scale of B_n samples, the best step of a noisy gradient is ε_max / (1 + B_n / B)
(McCandlish et al., arXiv 1812.06162): linear in B while noise dominates, then saturated. The spiked random-matrix
model of the Hessian gives the same shape (Granziol et al., arXiv 2006.09092), and its square root for Adam, whose steps are
already divided by the gradient's root mean square.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from ...config.problems import Problem
from ..progress import Progress

RULES: dict[str, Callable[[float, float], float]] = {
    "none": lambda growth, noise: 1.0,
    "sqrt": lambda growth, noise: math.sqrt(growth),
    "linear": lambda growth, noise: growth,
    "sqrt_saturating": lambda growth, noise: math.sqrt((1 + noise) / (1 + noise / growth)),
}
"""Rule → factor as a function of the batch's growth B / B_0 and the noise scale relative to the start, B_n / B_0."""


def coupling_problems(rule: str, measures_noise: bool, schedule: str) -> Iterator[Problem]:
    """Yield what keeps a known rule from being used.

    measures_noise: whether the batch's controller has a noise scale; schedule: its name.
    """
    if rule == "sqrt_saturating" and not measures_noise:
        fix = "choose batch=norm_test, noise_scale or critical_loss, or optim.lr_coupling=sqrt"
        yield Problem("optim.lr_coupling", "sqrt_saturating needs a noise scale, and batch measures none", fix)
    if rule != "none" and schedule == "power":
        message = "the power schedule is already proportional to the batch"
        yield Problem("optim.lr_coupling", message, "use none, or another schedule")


class Coupling:
    """The factor of `optim.lr_coupling`.

    rule  none; sqrt (Adam and its kin, below the critical batch); linear (SGD, below the critical batch);
          sqrt_saturating: √((1 + B_n / B_0) / (1 + B_n / B)), sqrt that saturates at the measured noise scale

    B_0 is the batch that `optim.lr` was chosen for: that of the run's first step, even after a resume with another batch.
    """

    def __init__(self, rule: str) -> None:
        self.rule = rule

    def factor(self, progress: Progress, noise_scale: float | None = None) -> float:
        """Compute the factor of the step about to be taken. With a noise scale of None or infinity, noise dominates."""
        first = progress.history.points[0].batch
        growth = progress.batch / first
        if self.rule == "sqrt_saturating" and (noise_scale is None or math.isinf(noise_scale)):
            return math.sqrt(growth)
        return RULES[self.rule](growth, (noise_scale or 0.0) / first)
