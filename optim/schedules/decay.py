"""Shapes of a learning rate's decay: factors from 1 to 0 over x in [0, 1]."""

from __future__ import annotations

import math
from collections.abc import Callable


def linear(x: float) -> float:
    """Return 1 − x."""
    return 1 - x


def one_minus_sqrt(x: float) -> float:
    """Return 1 − √x, the best cool-down in Hägele et al., arXiv 2405.18392."""
    return 1 - math.sqrt(x)


def cosine(x: float) -> float:
    """Return half a cosine wave, (1 + cos πx) / 2."""
    return (1 + math.cos(math.pi * x)) / 2


def exponential_to_zero(x: float) -> float:
    """Return e^−x, shifted and stretched to run from exactly 1 to exactly 0: (e · e^−x − 1) / (e − 1).

    With the final ratio d mixed in as d + (1 − d) · f this is open-lm-engine's exponential decay, and the form of the
    power schedule's last tenth (arXiv 2408.13359).
    """
    return (math.exp(1 - x) - 1) / (math.e - 1)


WINDOWED: dict[str, Callable[[float], float]] = {
    "linear": linear,
    "1-sqrt": one_minus_sqrt,
    "cosine": cosine,
    "exponential_to_zero": exponential_to_zero,
}


def halving(elapsed: float, half_life: float) -> float:
    """Return 0.5^(elapsed / half_life), MiniCPM's decay (arXiv 2404.06395), which has no end."""
    return 0.5 ** (elapsed / half_life)
