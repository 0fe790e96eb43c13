"""Products whose results are symmetric: what is computed where quack is, and when, with a stand-in for its kernel."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from meshloom.kernels import symmetric
from meshloom.kernels.symmetric import symmetric_product
from meshloom.optim.optimizers.matrix_config import MuonConfig
from meshloom.optim.optimizers.muon import Muon
from meshloom.optim.optimizers.parameters import NamedParameter, Unsharded
from meshloom.parallel.torch import assembly

CUDA = torch.device("cuda")


def gemm_symmetric(
    left: torch.Tensor, right: torch.Tensor, C: torch.Tensor | None = None, alpha: float = 1.0, beta: float = 1.0
) -> torch.Tensor:
    """quack's product: of the lower triangle, which is then mirrored."""
    whole = alpha * left.double() @ right.double()
    if C is not None:
        whole += beta * C.double()
    return (whole.tril() + whole.tril(-1).mT).to(left.dtype)


@pytest.fixture
def quack(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """A package whose calls are noted, on a device that takes it."""
    shapes: list[tuple[int, ...]] = []

    def noted(left: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        shapes.append(tuple(left.shape))
        return gemm_symmetric(left, *args, **kwargs)

    monkeypatch.setattr(symmetric, "package", lambda: SimpleNamespace(gemm_symmetric=noted))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    return shapes


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("halved", [False, True])
def test_both_ways_compute_the_product(halved: bool, quack: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(symmetric, "_fits", lambda *_: halved)
    monkeypatch.setattr(symmetric, "unsupported_reason", lambda _: None)
    x = drawn(2, 8, 24)
    gram = symmetric_product(x, x.mT)
    torch.testing.assert_close(gram, x @ x.mT)
    torch.testing.assert_close(symmetric_product(gram, gram, gram, alpha=2, beta=-3), 2 * gram @ gram - 3 * gram)
    assert quack == ([(2, 8, 24), (2, 8, 8)] if halved else [])


def on_gpu(*shape: int, dtype: torch.dtype = torch.float16, transposed: bool = False) -> Any:
    """The attributes of an operand on a GPU that are looked at."""
    strides = (shape[1] * shape[2], *((1, shape[1]) if transposed else (shape[2], 1)))
    return SimpleNamespace(shape=shape, is_cuda=True, dtype=dtype, stride=lambda: strides)


def test_device_and_shape_alone_decide_which_it_is() -> None:
    big = on_gpu(4, 2048, 8192)
    assert symmetric._fits(big, big)
    assert symmetric._fits(on_gpu(4, 2048, 8192, transposed=True), on_gpu(4, 8192, 2048))
    assert symmetric._fits(on_gpu(32, 512, 2048), on_gpu(32, 2048, 512))
    assert not symmetric._fits(on_gpu(1, 2048, 8192), big), "torch fills a GPU as well with few tiles"
    assert not symmetric._fits(on_gpu(4, 2044, 8192), big) and not symmetric._fits(on_gpu(4, 2048, 8190), big)
    assert not symmetric._fits(on_gpu(4, 2048, 8192, dtype=torch.float32), big)
    assert not symmetric._fits(torch.zeros(8, 1024, 8).half(), torch.zeros(8, 8, 1024).half()), "it is on a CPU"
    strided = on_gpu(4, 2048, 8192)
    strided.stride = lambda: (2048 * 8192 * 2, 8192 * 2, 2)
    assert not symmetric._fits(strided, big)


@pytest.mark.parametrize("wrong", [False, True])
def test_the_kernel_is_tried_before_it_is_used(
    wrong: bool, quack: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert symmetric._error(torch.device("cpu")) < 1e-3 and len(quack) == 6
    monkeypatch.setattr(symmetric, "_error", lambda _: 0.1 if wrong else 1e-3)
    assert symmetric.unsupported_reason.__wrapped__(CUDA) == ("it is wrong by 0.1" if wrong else None)


def test_a_product_left_out_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    package = SimpleNamespace(gemm_symmetric=lambda *args, **_: gemm_symmetric(*args))  # without an addend
    monkeypatch.setattr(symmetric, "package", lambda: package)
    assert symmetric._error(torch.device("cpu")) > 0.1


@pytest.mark.parametrize("others", [False, True])
def test_no_rank_uses_the_kernel_where_another_cannot(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, others: bool
) -> None:
    caplog.set_level("INFO", logger="meshloom")
    waited: list[str] = []
    monkeypatch.setattr(assembly.precompile, "wait", lambda name, *_: waited.append(name))
    monkeypatch.setattr(symmetric, "_fits", lambda *_: True)
    monkeypatch.setattr(symmetric, "unsupported_reason", lambda _: None)
    monkeypatch.setattr(symmetric, "_allowed", True)
    monkeypatch.setattr(symmetric, "_half", lambda *_: torch.ones(()))
    x = torch.zeros(1, 8, 8)
    mesh: Any = SimpleNamespace(device=CUDA, rank=0, is_main=True, any=lambda mine: mine or others)
    settings: Any = SimpleNamespace(compute=torch.bfloat16)
    weight = torch.nn.Parameter(torch.zeros(8, 8))
    optimizer = Muon(MuonConfig(), [NamedParameter("layers.0.w", weight, (8, 8), hidden=True)], Unsharded())
    assembly.agree_on_symmetric_products(optimizer, mesh, settings)
    assert waited == [symmetric.NAME] and ("symmetric products: another rank can't" in caplog.text) == others
    assert symmetric_product(x, x).sum() == (0 if others else 1)
