"""Newton–Schulz iteration: a matrix's nearest semi-orthogonal matrix, by products alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ...kernels.symmetric import symmetric_product
from .newton_schulz_forms import STEPS, groups_of_steps

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic a·x + b·x³ + c·x⁵ that Keller Jordan's Muon iterates: steep at 0, and within 0.7 to 1.2 near 1."""
EPS = 1e-7
ITERATED_IN = {"cuda": torch.float16}
"""Dtypes in which bf16 matrices are iterated, by type of device; fp32 on others. Divided by their norm all numbers are of
moderate size: fp16 has three more bits for them than bf16, and products in it are as fast on GPUs. In bf16 the error is about
six times as large. CPUs mostly have no fast products in either (512 × 1024: fp16 16 s, bf16 8.4 s, fp32 0.18 s)."""


def orthogonalize(matrices: Sequence[torch.Tensor], steps: int = STEPS, factor: float = 1.0) -> torch.Tensor:
    """Replace the singular values of each matrix by about `factor`, keeping its singular vectors.

    matrices: of one shape (rows, columns), not changed. Returns (matrices, rows, columns), in the iteration's dtype.
    A matrix is divided by its Frobenius norm first, so that no singular value exceeds 1. Zero stays zero.
    """
    rows, columns = matrices[0].shape
    x, wide = _normalized(matrices), rows <= columns
    groups = groups_of_steps(rows, columns, steps)
    for number, count in enumerate(groups):
        short = x if wide else x.mT
        q = _polynomial(symmetric_product(short, short.mT), count, factor if number == len(groups) - 1 else 1.0)
        x = q @ x if wide else x @ q  # on the side of the shorter dimension: neither is ever transposed in memory
    return x


def orthogonalize_all(
    matrices: Sequence[torch.Tensor], steps: int = STEPS, factor: Callable[[int, int], float] = lambda _rows, _columns: 1.0
) -> list[torch.Tensor]:
    """Orthogonalise matrices of any shapes, those of equal shape together. factor: by rows and columns"""
    by_shape: dict[tuple[int, int], list[int]] = {}
    for number, matrix in enumerate(matrices):
        by_shape.setdefault((matrix.shape[0], matrix.shape[1]), []).append(number)
    results: list[torch.Tensor] = list(matrices)
    for shape, numbers in by_shape.items():
        batch = orthogonalize([matrices[number] for number in numbers], steps, factor(*shape))
        for number, result in zip(numbers, batch, strict=True):
            results[number] = result
    return results


def _normalized(matrices: Sequence[torch.Tensor]) -> torch.Tensor:
    """Write matrices, each over its norm, into one batch: a pass over memory, besides that of the norm."""
    first = matrices[0]
    norm_dtype = torch.promote_types(first.dtype, torch.float32)
    dtype = ITERATED_IN.get(first.device.type, torch.float32) if first.dtype == torch.bfloat16 else first.dtype
    norms = torch.stack([torch.linalg.vector_norm(each, dtype=norm_dtype) for each in matrices]) + EPS
    batch = torch.empty(len(matrices), *first.shape, dtype=dtype, device=first.device)
    for number, each in enumerate(matrices):
        torch.div(each, norms[number : number + 1], out=batch[number])  # of one dimension: it is not rounded to `each`'s dtype
    return batch


def _polynomial(gram: torch.Tensor, count: int, factor: float) -> torch.Tensor:
    """Return what so many iterations multiply a matrix by, times `factor`, from its Gram matrix: (matrices, short, short)."""
    a, b, c = COEFFICIENTS
    q: torch.Tensor | None = None
    for left in reversed(range(count)):
        last = factor if left == 0 else 1.0
        alone = last if q is None else 1.0
        z = symmetric_product(gram, gram, gram, alpha=alone * c, beta=alone * b)  # without a·I, for small eigenvalues
        if left:
            half = symmetric_product(gram, z, gram, beta=a)
            gram = symmetric_product(half, z, half, beta=a)
        if q is None:
            q = z
            q.diagonal(dim1=-2, dim2=-1).add_(alone * a)
        else:
            q = symmetric_product(q, z, q, alpha=last, beta=last * a)
    assert q is not None
    return q
