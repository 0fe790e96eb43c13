"""Newton–Schulz iteration: a matrix's nearest semi-orthogonal matrix, by products alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic a·x + b·x³ + c·x⁵ that Keller Jordan's Muon iterates: steep at 0, and within 0.7 to 1.2 near 1."""
STEPS = 5
EPS = 1e-7


def orthogonalize(matrices_BRC: torch.Tensor, steps: int = STEPS) -> torch.Tensor:
    """Replace the singular values of each matrix by about 1, keeping its singular vectors: (B, R, C), in its dtype.

    A matrix is divided by its Frobenius norm first, so that no singular value exceeds 1. Zero stays zero.
    """
    a, b, c = COEFFICIENTS
    rows, columns = matrices_BRC.shape[-2:]
    x = matrices_BRC.mT if rows > columns else matrices_BRC
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + EPS)
    for _ in range(steps):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        # Not by a on the polynomial's diagonal: rounded to bf16 there, it would make every row too long or too short alike.
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if rows > columns else x


def orthogonalize_all(matrices: Sequence[torch.Tensor], steps: int = STEPS) -> list[torch.Tensor]:
    """Orthogonalise matrices of any shapes, those of equal shape together."""
    by_shape: dict[torch.Size, list[int]] = {}
    for number, matrix in enumerate(matrices):
        by_shape.setdefault(matrix.shape, []).append(number)
    results: list[torch.Tensor] = list(matrices)
    for numbers in by_shape.values():
        batch = orthogonalize(torch.stack([matrices[number] for number in numbers]), steps)
        for number, result in zip(numbers, batch, strict=True):
            results[number] = result
    return results


def cost(rows: int, columns: int) -> float:
    """Count the multiplications of one iteration, by which matrices are shared out."""
    short, long = sorted((rows, columns))
    return 2.0 * short * short * long + short**3
