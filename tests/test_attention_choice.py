"""The fastest attention kernel is tried first; noise and kernels that can't run don't choose."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch.nn.attention import SDPBackend

from meshloom.models import attention, attention_choice, attention_kernels


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    order, kernel = list(attention.CUDA_BACKENDS), attention_kernels.dense_kernel
    yield
    attention.CUDA_BACKENDS[:] = order
    attention_kernels.dense_kernel = kernel


@pytest.mark.parametrize(
    ("cudnn", "flash", "chosen"),
    [(1.0, 0.5, "flash"), (1.0, 2.0, "cudnn"), (1.0, 0.99, "cudnn"), (math.inf, 9.0, "flash"), (math.inf, math.inf, "cudnn")],
)
def test_the_fastest_comes_first_and_the_rest_stay(cudnn: float, flash: float, chosen: str) -> None:
    assert attention_choice.prefer({"cudnn": cudnn, "flash": flash}) == chosen
    rest = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    pair = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
    assert [*(pair if chosen == "cudnn" else pair[::-1]), *rest] == attention.CUDA_BACKENDS
    assert attention_kernels.dense_kernel == chosen


def test_a_newer_flash_that_is_not_there_or_fails_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert attention_choice.use_newer_flash() is None
    monkeypatch.setattr(attention_choice, "NEWER_FLASH", {"no such name": "json"})
    assert attention_choice.use_newer_flash() is None


@pytest.mark.gpu
def test_kernels_are_timed_and_what_cant_run_takes_forever() -> None:
    device = torch.device("cuda")
    shape = attention_choice.Shape(1024, 4, 2, 64)
    assert all(0 < attention_choice.seconds(kernel, shape, device) < 1 for kernel in attention_choice.KERNELS)
    assert attention_choice.seconds("flash", attention_choice.Shape(1024, 4, 2, 512), device) == math.inf
