"""Aggregates of islands' differences, beside closed forms and the condition of a geometric median on the whole vectors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from meshloom.optim.local.aggregate import median_coefficients


def coefficients(rows_KN: np.ndarray, tokens: list[float] | None = None) -> np.ndarray:
    rows = torch.from_numpy(rows_KN)
    return median_coefficients(rows @ rows.T, torch.tensor(tokens or [1.0] * len(rows), dtype=torch.float64)).numpy()


def median(rows_KN: np.ndarray, tokens: list[float] | None = None) -> np.ndarray:
    found = coefficients(rows_KN, tokens)
    assert np.all(found[~np.isfinite(rows_KN).all(axis=1)] == 0)
    return found @ np.nan_to_num(rows_KN)


def honest(islands: int, cosine: float, size: int = 20_000) -> np.ndarray:
    """Return differences of about these cosines to one another."""
    rng = np.random.default_rng(islands)
    return cosine**0.5 * rng.normal(size=size) + (1 - cosine) ** 0.5 * rng.normal(size=(islands, size))


@pytest.mark.parametrize("islands", [3, 4, 8])
@pytest.mark.parametrize("cosine", [0.05, 0.2, 0.5])
def test_islands_that_agree_as_well_with_one_another_get_their_mean(islands: int, cosine: float) -> None:
    assert coefficients(honest(islands, cosine)) == pytest.approx(np.full(islands, 1 / islands), rel=0.1)
    gram = torch.full((islands, islands), cosine, dtype=torch.float64).fill_diagonal_(1)
    tied = median_coefficients(gram, torch.ones(islands, dtype=torch.float64)).numpy()
    assert tied == pytest.approx(np.full(islands, 1 / islands), rel=1e-12)


@pytest.mark.parametrize("islands", [3, 4, 7])
def test_pulls_of_all_islands_are_in_balance(islands: int) -> None:
    """The condition of a geometric median that is none of the points."""
    rows = honest(islands, 0.4, size=40)
    rows[1] *= -50
    tokens = np.random.default_rng(islands).integers(80, 100, size=islands).astype(float)
    from_median = rows - median(rows, list(tokens))
    pulls = tokens[:, None] / tokens.sum() * from_median / np.linalg.norm(from_median, axis=1)[:, None]
    assert pulls.sum(axis=0) == pytest.approx(np.zeros(40), abs=1e-9)


@pytest.mark.parametrize("far", [2.0, 1e6, 1e12])
def test_one_that_is_far_away_pulls_as_one_that_is_near(far: float) -> None:
    """Fermat's point: two sides are seen from it under 120 degrees."""
    rows = np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, far]])
    assert median(rows) == pytest.approx([0, 1 / 3**0.5], abs=1e-9)


def test_a_majority_that_is_of_one_mind_decides() -> None:
    """Be the other one opposite, long, or both; what is not finite counts for nothing, nor what was not learned."""
    common, other, broken = np.eye(6)[0] * 3, np.eye(6)[3] * 1e6, np.array([1.0, np.nan, 0.0, 1.0, 0.0, 0.0])
    for wrong in (-common, -1e3 * common, other):
        assert median(np.stack([common, common, wrong])) == pytest.approx(common, abs=1e-4)
    assert median(np.stack([common, broken, common, other]), [3.0, 9.0, 1.0, 0.0]) == pytest.approx(common, rel=1e-12)
    assert median(np.zeros((3, 4))).tolist() == [0, 0, 0, 0]
    assert coefficients(np.zeros((3, 4)), [0.0] * 3).tolist() == [0, 0, 0]
