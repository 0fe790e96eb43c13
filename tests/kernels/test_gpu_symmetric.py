"""quack's products of symmetric results against the formula in float64, and Newton–Schulz by them."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from meshloom.kernels import symmetric
from meshloom.kernels.symmetric import symmetric_product
from meshloom.optim.optimizers.newton_schulz import COEFFICIENTS, EPS, orthogonalize

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def quack() -> None:
    if importlib.util.find_spec("quack") is None or torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs the extra meshloom[flash4] and a Hopper GPU")
    assert symmetric.unsupported_reason(torch.device("cuda", 0)) is None


def far(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    return ((found.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 2048, 512), (8, 1032, 264), (35, 512, 2048)])
@pytest.mark.parametrize("wide", [True, False])
def test_product(dtype: torch.dtype, shape: tuple[int, int, int], wide: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape if wide else (shape[0], shape[2], shape[1]), device="cuda", dtype=dtype) / shape[2] ** 0.5
    left = x if wide else x.mT
    assert symmetric._fits(left, left.mT)
    tolerance = 4e-3 if dtype == torch.bfloat16 else 5e-4
    gram = symmetric_product(left, left.mT)
    assert far(gram, left.double() @ left.double().mT) < tolerance
    assert torch.equal(gram, gram.mT)
    square = symmetric_product(gram, gram, gram, alpha=2.0315, beta=-4.775)
    assert far(square, 2.0315 * gram.double() @ gram.double() - 4.775 * gram.double()) < tolerance
    cube = symmetric_product(gram, square, gram, beta=3.4445)
    assert (
        far(cube, gram.double() @ square.double() + 3.4445 * gram.double()) < 2 * tolerance
    )  # it is symmetric but for rounding


@pytest.mark.parametrize("shape", [(2048, 2048), (2048, 4096), (4096, 2048)])
def test_newton_schulz(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrices = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) + mean for mean in (0, 1, 3)]
    a, b, c = COEFFICIENTS
    for matrix, found in zip(matrices, orthogonalize(matrices), strict=True):
        x = matrix.double() / (matrix.double().norm() + EPS)
        for _ in range(5):
            gram = x @ x.mT if shape[0] <= shape[1] else x.mT @ x
            q = b * gram + c * gram @ gram
            x = a * x + (q @ x if shape[0] <= shape[1] else x @ q)
        assert far(found, x) < 0.02
