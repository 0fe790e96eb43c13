"""Forms of the Newton–Schulz iteration, equal in exact arithmetic, and their numbers of multiplications. Imports no torch.

An iteration multiplies a matrix X (short × long) by Q = a·I + b·G + c·G² with G = X·Xᵀ. The next Gram matrix is then Q·G·Q. So
several iterations can be taken on Gram matrices alone: their factors are multiplied, and X is multiplied once, by all of them
("Gram Newton–Schulz": Zhang, Amsel, Chen, Dao 2026, https://dao-lab.ai/blog/2026/gram-newton-schulz). That saves products of X,
and adds products of short × short matrices.

Rounding limits how many are taken together. It makes some small eigenvalues of G negative. Exact ones rise by up to a² an
iteration, towards 1, and stop there. Those below zero fall as fast and do not stop. So G is computed from X again in time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

STEPS = 5
MOST_TOGETHER = 3
"""Iterations on one Gram matrix, at most. Of four, a spurious eigenvalue of -1e-4 would come to -0.2 before the last."""


def groups_of_steps(rows: int, columns: int, steps: int = STEPS) -> tuple[int, ...]:
    """Return how many iterations are taken on each Gram matrix, one group after another, for matrices of a shape.

    The cheaper of two: each by itself, or as many together as may be. So long sides of at least 1.5 short ones are taken
    together. It depends on nothing else, so that a run's numbers follow from its recipe.
    """
    groups = -(-steps // MOST_TOGETHER)
    together = tuple(steps // groups + (number < steps % groups) for number in range(groups))
    return min((1,) * steps, together, key=lambda each: _multiplications(rows, columns, each))


def products(rows: int, columns: int, groups: Sequence[int]) -> Iterator[tuple[tuple[int, int, int], int]]:
    """Yield the sizes of products, as (rows, columns, terms of each sum), and how many there are."""
    short, long = sorted((rows, columns))
    yield (short, short, long), len(groups)  # Gram matrices
    # Squares; and after the first of a group, its product with the others' factor, and two for its Gram matrix.
    yield (short, short, short), sum(4 * count - 3 for count in groups)
    yield (short, long, short), len(groups)


def cost(rows: int, columns: int, steps: int = STEPS) -> float:
    """Count the multiplications of all iterations of a matrix, by which matrices are shared out."""
    return _multiplications(rows, columns, groups_of_steps(rows, columns, steps))


def _multiplications(rows: int, columns: int, groups: Sequence[int]) -> float:
    return float(sum(m * n * k * times for (m, n, k), times in products(rows, columns, groups)))
