"""The learning rate's coupling to the batch size."""

from __future__ import annotations

import math

import pytest

from meshloom.optim.optimizers.config import COUPLINGS, AdamWConfig
from meshloom.optim.progress import Progress
from meshloom.optim.schedules.coupling import RULES, Coupling, coupling_problems


def grown(first: int, batch: int) -> Progress:
    """Make the progress of a run that began with one batch and is about to take another."""
    return Progress().before(first, 16).after(first, first * 16).before(batch, 16)


def factor(rule: str, first: int, batch: int, noise: float | None = None) -> float:
    return Coupling(rule).factor(grown(first, batch), noise)


def test_doubling_the_batch() -> None:
    """ALGORITHMS 2.4: twice the rate for SGD, 1.41421 for Adam, and less once noise no longer dominates."""
    assert factor("none", 32, 64) == 1
    assert factor("linear", 32, 64) == 2
    assert factor("sqrt", 32, 64) == pytest.approx(1.41421, abs=1e-5)
    assert factor("sqrt_saturating", 32, 64, 1e9) == pytest.approx(1.41421, abs=1e-5)
    assert factor("sqrt_saturating", 32, 64, 32.0) == pytest.approx(math.sqrt(2 / 1.5))
    assert factor("sqrt_saturating", 32, 64, 0.0) == 1
    assert factor("sqrt_saturating", 32, 10**9, 96.0) == pytest.approx(2), "√(1 + B_n / B_0) at most"
    for noise in (None, math.inf):
        assert factor("sqrt_saturating", 32, 64, noise) == pytest.approx(math.sqrt(2))


@pytest.mark.parametrize("rule", RULES)
def test_the_batch_that_the_rate_was_chosen_for_changes_nothing(rule: str) -> None:
    assert [factor(rule, 48, 48, noise) for noise in (None, 0.0, 100.0)] == [1, 1, 1]


def test_problems() -> None:
    assert list(coupling_problems("sqrt_saturating", True, "wsd")) == []
    assert "measures none" in str(next(coupling_problems("sqrt_saturating", False, "wsd")))
    assert "already proportional" in str(next(coupling_problems("linear", False, "power")))
    assert "choose one of none, sqrt" in str(AdamWConfig(lr_coupling="cube").problems()[0])
    assert set(COUPLINGS) == set(RULES)
