"""Fits of scaling laws to measurements: optima of sweeps, power laws, L(N, D), and the critical batch.

Needs SciPy (`pip install meshloom[fit]`) where a fit is not linear.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Numbers = Sequence[float] | np.ndarray


def _least_squares(residuals: Any, start: Numbers, **options: Any) -> Any:
    try:
        from scipy.optimize import least_squares
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("fitting needs SciPy: pip install 'meshloom[fit]'") from error
    return least_squares(residuals, np.asarray(start, dtype=float), **options)


@dataclass(frozen=True)
class PowerLaw:
    """A fitted power law y = constant · Π x_k^exponents[k].

    errors  standard error of each exponent, from the scatter around the fit; nan where there are no spare points
    spread  root mean square of ln y − ln fit
    """

    constant: float
    exponents: dict[str, float]
    errors: dict[str, float]
    spread: float

    def __call__(self, **factors: float) -> float:
        """Evaluate y at these factors."""
        return self.constant * math.prod(factors[name] ** power for name, power in self.exponents.items())

    def __str__(self) -> str:
        terms = [f"{name}^{power:.3f} (±{self.errors[name]:.3f})" for name, power in self.exponents.items()]
        return " · ".join([f"{self.constant:.4g}", *terms])


def fit_power_law(y: Numbers, **factors: Numbers) -> PowerLaw:
    """Fit a power law by ordinary least squares in logarithms.

    Raises ValueError where the points can't tell the exponents apart (too few, or a factor that doesn't vary).
    """
    names = list(factors)
    design = np.column_stack([np.ones(len(y)), *(np.log(np.asarray(factors[name], float)) for name in names)])
    if np.linalg.matrix_rank(design) < design.shape[1]:
        raise ValueError(f"{len(y)} points can't tell the powers of {', '.join(names)} apart: vary each on its own")
    logs = np.log(np.asarray(y, float))
    solution = np.linalg.lstsq(design, logs, rcond=None)[0]
    residuals = logs - design @ solution
    spare = len(y) - design.shape[1]
    variance = residuals @ residuals / spare if spare else math.nan
    errors = np.sqrt(variance * np.diag(np.linalg.inv(design.T @ design)))
    return PowerLaw(
        constant=math.exp(solution[0]),
        exponents={name: float(power) for name, power in zip(names, solution[1:], strict=True)},
        errors={name: float(error) for name, error in zip(names, errors[1:], strict=True)},
        spread=float(np.sqrt(np.mean(residuals**2))),
    )


@dataclass(frozen=True)
class Optimum:
    """The best value of a swept setting. inside: whether worse values were tried on both sides of it."""

    value: float
    loss: float
    inside: bool


def optimum(values: Numbers, losses: Numbers) -> Optimum:
    """Find the vertex of the parabola in ln(value) through the best point and its neighbours; at an edge, the best point."""
    order = np.argsort(values)
    x, y = np.log(np.asarray(values, float))[order], np.asarray(losses, float)[order]
    best = int(np.argmin(y))
    if best in (0, len(y) - 1):
        return Optimum(float(np.exp(x[best])), float(y[best]), inside=False)
    curvature, slope, offset = np.polyfit(x[best - 1 : best + 2] - x[best], y[best - 1 : best + 2], 2)
    if curvature <= 0:  # three equal losses
        return Optimum(float(np.exp(x[best])), float(y[best]), inside=True)
    shift = -slope / (2 * curvature)
    return Optimum(float(np.exp(x[best] + shift)), float(offset + slope * shift / 2), inside=True)


@dataclass(frozen=True)
class LossFit:
    """L(N, D) = floor + n_constant / N^n_power + d_constant / D^d_power (Hoffmann et al., arXiv 2203.15556)."""

    floor: float
    n_constant: float
    n_power: float
    d_constant: float
    d_power: float
    spread: float

    def __call__(self, parameters: float, tokens: float) -> float:
        """Evaluate the loss."""
        return self.floor + self.n_constant * parameters**-self.n_power + self.d_constant * tokens**-self.d_power

    def __str__(self) -> str:
        return f"{self.floor:.4g} + {self.n_constant:.4g} / N^{self.n_power:.3f} + {self.d_constant:.4g} / D^{self.d_power:.3f}"


def fit_loss(parameters: Numbers, tokens: Numbers, losses: Numbers) -> LossFit:
    """Fit L(N, D) by Huber regression (δ = 1e-3) of ln L from a grid of starts, as Hoffmann et al. do.

    Raises ValueError with fewer than five runs, or where N or D doesn't vary.
    """
    n, d, logs = (np.log(np.asarray(values, float)) for values in (parameters, tokens, losses))
    if len(logs) < 5:
        raise ValueError(f"L(N, D) has five constants, which {len(logs)} runs can't fix")
    if np.ptp(n) == 0 or np.ptp(d) == 0:
        raise ValueError("L(N, D) needs runs of more than one size and more than one length")
    # Centred, so that a power and its constant don't pull at one another.
    n0, d0 = n.mean(), d.mean()

    def residuals(theta: np.ndarray) -> np.ndarray:
        e, a, alpha, b, beta = theta
        return np.logaddexp(np.logaddexp(a - alpha * (n - n0), b - beta * (d - d0)), e) - logs

    best: Any = None
    lowest = float(logs.min())
    for share in (0.3, 0.6, 0.9):
        for power in (0.1, 0.3, 0.6):
            rest = math.log((1 - share) / 2) + lowest
            start = [math.log(share) + lowest, rest, power, rest, power]
            found = _least_squares(residuals, start, loss="huber", f_scale=1e-3, xtol=1e-14, ftol=1e-14, gtol=1e-14)
            if best is None or found.cost < best.cost:
                best = found
    e, a, alpha, b, beta = best.x
    return LossFit(
        math.exp(e),
        math.exp(a + alpha * n0),
        float(alpha),
        math.exp(b + beta * d0),
        float(beta),
        float(np.sqrt(np.mean(residuals(best.x) ** 2))),
    )


@dataclass(frozen=True)
class CriticalFit:
    """A fit of S = S_min (1 + B_crit / B), steps to one loss at batch B (tokens). spread: RMS of ln S − ln fit."""

    steps_min: float
    batch: float
    spread: float


def fit_critical_batch(batch_tokens: Numbers, steps: Numbers) -> CriticalFit:
    """Fit the trade-off of steps against tokens at one loss, in logarithms.

    It is (S / S_min − 1)(E / E_min − 1) = 1 (McCandlish et al.). Raises ValueError with fewer than two batch sizes.
    """
    b, s = np.asarray(batch_tokens, float), np.asarray(steps, float)
    if len(np.unique(b)) < 2:
        raise ValueError("the critical batch needs runs of at least two batch sizes")

    def residuals(theta: np.ndarray) -> np.ndarray:
        return theta[0] + np.logaddexp(0.0, theta[1] - np.log(b)) - np.log(s)

    found = _least_squares(residuals, [math.log(s.min()), float(np.log(b).mean())])
    return CriticalFit(math.exp(found.x[0]), math.exp(found.x[1]), float(np.sqrt(np.mean(found.fun**2))))


def steps_to(loss: float, steps: Numbers, losses: Numbers) -> float | None:
    """Find the step where a curve first comes down to `loss`, interpolated linearly; None if it doesn't."""
    y = np.asarray(losses, float)
    below = np.flatnonzero(y <= loss)
    if not len(below):
        return None
    at = int(below[0])
    if at == 0:
        return None  # it began below: when it came down isn't known
    part = (y[at - 1] - loss) / (y[at - 1] - y[at])
    return float(steps[at - 1] + part * (steps[at] - steps[at - 1]))


def fit_critical_law(
    curves: Mapping[float, tuple[Numbers, Numbers]], levels: Numbers
) -> tuple[PowerLaw, dict[float, CriticalFit]]:
    """Fit B_crit(L) = constant · L^exponent to loss curves of runs that differ in batch alone.

    curves: batch in tokens → (steps, smoothed losses). levels: losses to measure at; those that fewer than two curves
    reach are left out. Returns the law, and the trade-off at each level. Raises ValueError with fewer than two levels.
    """
    fits: dict[float, CriticalFit] = {}
    for level in levels:
        reached = {batch: steps_to(level, *curve) for batch, curve in curves.items()}
        points = {batch: count for batch, count in reached.items() if count is not None}
        if len(points) >= 2:
            fits[float(level)] = fit_critical_batch(list(points), list(points.values()))
    if len(fits) < 2:
        raise ValueError("fewer than two losses are reached by two runs of different batch sizes")
    return fit_power_law([fit.batch for fit in fits.values()], L=list(fits)), fits
