"""The learning rate's coupling to the batch size."""

from __future__ import annotations

import math

import pytest

from meshloom.optim.schedules.coupling import RULES, Coupling


def test_doubling_the_batch() -> None:
    """ALGORITHMS 2.4: twice the rate for SGD, 1.41421 for Adam, and less once noise no longer rules."""
    assert Coupling("none", 32).factor(64) == 1
    assert Coupling("linear", 32).factor(64) == 2
    assert Coupling("sqrt", 32).factor(64) == pytest.approx(1.41421, abs=1e-5)
    saturating = Coupling("sqrt_saturating", 32)
    assert saturating.factor(64, 1e9) == pytest.approx(1.41421, abs=1e-5)
    assert saturating.factor(64, 32.0) == pytest.approx(math.sqrt(2 / 1.5))
    assert saturating.factor(64, 0.0) == 1
    assert saturating.factor(10**9, 96.0) == pytest.approx(2), "√(1 + B_n / B_0) at most"
    assert saturating.factor(64, None) == saturating.factor(64, math.inf) == pytest.approx(math.sqrt(2))


@pytest.mark.parametrize("rule", RULES)
def test_the_batch_that_the_rate_was_chosen_for_changes_nothing(rule: str) -> None:
    assert [Coupling(rule, 48).factor(48, noise) for noise in (None, 0.0, 100.0)] == [1, 1, 1]


def test_problems() -> None:
    assert Coupling("sqrt_saturating", 8).problems(measures_noise=True, schedule="wsd") == []
    assert "measures none" in str(Coupling("sqrt_saturating", 8).problems(measures_noise=False, schedule="wsd")[0])
    assert "already proportional" in str(Coupling("linear", 8).problems(measures_noise=False, schedule="power")[0])
    assert "choose one of none, sqrt" in str(Coupling("cube", 8).problems(measures_noise=False, schedule="wsd")[0])
