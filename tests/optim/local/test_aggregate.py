"""What islands' differences become, beside NumPy on the whole vectors and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from meshloom.optim.local.aggregate import flag_coefficients
from support.islands import flag_aggregate


def flag(rows_KN: np.ndarray, tokens: list[float]) -> np.ndarray:
    rows = torch.from_numpy(rows_KN)
    coefficients = flag_coefficients(rows @ rows.T, torch.tensor(tokens, dtype=torch.float64)).numpy()
    assert np.all(coefficients[~np.isfinite(rows_KN).all(axis=1)] == 0)
    return coefficients @ np.nan_to_num(rows_KN)


@pytest.mark.parametrize("islands", [3, 4, 7])
def test_flag_is_that_of_singular_vectors_of_the_whole_differences(islands: int) -> None:
    rng = np.random.default_rng(islands)
    rows = rng.normal(size=40) + 0.8 * rng.normal(size=(islands, 40))
    rows[1] *= -50
    tokens = rng.integers(1, 100, size=islands).astype(float)
    assert flag(rows, list(tokens)) == pytest.approx(flag_aggregate(rows, tokens / tokens.sum()), rel=1e-9)


def test_flag_of_one_direction_is_that_direction() -> None:
    """And what is orthogonal to it only takes its share away."""
    common, other = np.eye(6)[0] * 3, np.eye(6)[3] * 1e6
    assert flag(np.stack([common] * 3), [5.0, 1.0, 2.0]) == pytest.approx(common, rel=1e-12)
    found = flag(np.stack([common, common, other, common]), [1.0, 1.0, 1.0, 1.0])
    assert found == pytest.approx(0.75 * common, rel=1e-9)


def test_what_is_not_finite_or_was_not_learned_counts_for_nothing() -> None:
    common, broken, far = np.ones(4), np.array([1.0, np.nan, 0.0, 1.0]), -9 * np.arange(4.0)
    assert flag(np.stack([common, broken, common, far]), [3.0, 9.0, 1.0, 0.0]) == pytest.approx(common, rel=1e-12)
    assert flag(np.zeros((3, 4)), [1.0, 1.0, 1.0]).tolist() == [0, 0, 0, 0]
