"""Batched products whose results are symmetric, half of them computed, on Hopper GPUs with quack-kernels (meshloom[flash4]).

quack's kernel computes the tiles on and below the diagonal, and writes each to its mirrored place, too. Everywhere else, and
where that would not be faster, torch computes the whole product. Which it is depends on the device, the shape and the number of
matrices: that of a wave, which depends on the layout. Their results differ by rounding. quack compiles a kernel on first use
(seconds), and keeps it on disk.

Shape legend: B matrices of a batch, M rows and columns of a result, K terms of its sums.
"""

from __future__ import annotations

import functools

import torch

from .swiglu import package
from .trial import hopper_reason

NAME = "symmetric products"
UNIT = 8
"""M and K must be multiples of it: the kernel reads 16 bytes at a time."""
LEAST = 1 << 23
"""Elements of a batch of results from which on quack is faster on an H200: two of 2048 × 2048 are a draw."""
_DTYPES = (torch.bfloat16, torch.float16)  # Newton–Schulz iterates in the latter; benchmarks compare both
_allowed = True
_TOLERANCE = 0.02  # bf16 rounds by 0.002 to 0.004 a product


def symmetric_product(
    left_BMK: torch.Tensor,
    right_BKM: torch.Tensor,
    added_BMM: torch.Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
) -> torch.Tensor:
    """Compute alpha · left · right + beta · added: (B, M, M). It must be symmetric; nothing checks that.

    The product is where right is left's transpose, and where both are polynomials of one symmetric matrix. `alpha` needs
    `added`. No gradient is computed.
    """
    if _allowed and _fits(left_BMK, right_BKM) and unsupported_reason(left_BMK.device) is None:
        return _half(left_BMK, right_BKM, added_BMM, alpha, beta)
    if added_BMM is None:
        return torch.bmm(left_BMK, right_BKM)
    return torch.baddbmm(added_BMM, left_BMK, right_BKM, beta=beta, alpha=alpha)


def set_allowed(allowed: bool) -> None:
    """Let this process use the kernel, where it works, or not: no rank uses it where another can't."""
    global _allowed
    _allowed = allowed


@functools.cache
def unsupported_reason(device: torch.device) -> str | None:
    """Return why the kernel can't be used on a device; None if it can. Imports, compiles and tries it when first asked.

    Raises RuntimeError where the trial has left the GPU unusable.
    """
    return hopper_reason(NAME, device, _error, _TOLERANCE)


def _fits(left_BMK: torch.Tensor, right_BKM: torch.Tensor) -> bool:
    """Return whether the kernel takes these operands, and is faster than torch."""
    count, rows, terms = left_BMK.shape
    if not left_BMK.is_cuda or left_BMK.dtype not in _DTYPES or count * rows * rows < LEAST:
        return False
    return rows % UNIT == 0 and terms % UNIT == 0 and all(1 in each.stride()[1:] for each in (left_BMK, right_BKM))


def _half(
    left_BMK: torch.Tensor, right_BKM: torch.Tensor, added_BMM: torch.Tensor | None, alpha: float = 1.0, beta: float = 1.0
) -> torch.Tensor:
    return package().gemm_symmetric(left_BMK, right_BKM, C=added_BMM, alpha=alpha, beta=beta)


def _error(device: torch.device) -> float:
    """Measure the largest relative distance (Frobenius norms) of small products from the formula in fp32.

    They are those of a Newton–Schulz iteration, whose kernels so are all compiled: of rows and of columns, and with an addend.
    """
    draw = torch.Generator(device).manual_seed(0)
    worst = 0.0
    for shape in ((2, 264, 136), (2, 136, 264)):  # no multiples of a tile
        x = torch.randn(shape, device=device, generator=draw).half() / 16
        left = x if shape[1] > shape[2] else x.mT
        gram = _half(left, left.mT, None)
        cases = [(gram, left.float() @ left.float().mT)]
        for alpha, beta in ((2.0, -3.0), (1.0, 3.0)):
            expected = alpha * gram.float() @ gram.float() + beta * gram.float()
            cases.append((_half(gram, gram, gram, alpha, beta), expected))
        worst = max(worst, *(((found.float() - wanted).norm() / wanted.norm()).item() for found, wanted in cases))
    return worst
