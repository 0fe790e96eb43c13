"""The fastest attention kernel is tried first; noise and kernels that can't run don't choose."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch.nn.attention import SDPBackend

from meshloom.models import attention, attention_choice, attention_kernels, flash4


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    order, kernel = list(attention.CUDA_BACKENDS), attention_kernels.dense_kernel
    yield
    attention.CUDA_BACKENDS[:] = order
    attention_kernels.dense_kernel = kernel


@pytest.mark.parametrize(
    ("cudnn", "flash", "flash4", "chosen"),
    [
        (1.0, 0.5, math.inf, "flash"),
        (1.0, 2.0, math.inf, "cudnn"),
        (1.0, 0.99, math.inf, "cudnn"),
        (math.inf, 9.0, math.inf, "flash"),
        (math.inf, math.inf, math.inf, "cudnn"),
        (1.0, 2.0, 0.8, "flash4"),
        (1.0, 0.5, 0.49, "flash"),
    ],
)
def test_the_fastest_comes_first_and_the_rest_stay(cudnn: float, flash: float, flash4: float, chosen: str) -> None:
    assert attention_choice.prefer({"cudnn": cudnn, "flash": flash, "flash4": flash4}) == chosen
    rest = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    pair = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
    assert [*(pair if flash > 0.97 * cudnn or cudnn == flash else pair[::-1]), *rest] == attention.CUDA_BACKENDS
    assert attention_kernels.dense_kernel == chosen


def test_flash_attention_4_says_why_it_is_not_used() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: tests/test_gpu_flash4.py")
    assert flash4.why_not() == "there is no GPU"
    assert attention_choice.seconds("flash4", attention_choice.Shape(64, 2, 2, 64), torch.device("cpu")) == math.inf


@pytest.mark.gpu
def test_kernels_are_timed_and_what_cant_run_takes_forever() -> None:
    device = torch.device("cuda")
    shape = attention_choice.Shape(1024, 4, 2, 64)
    assert all(0 < attention_choice.seconds(kernel, shape, device) < 1 for kernel in ("cudnn", "flash"))
    assert attention_choice.seconds("flash", attention_choice.Shape(1024, 4, 2, 512), device) == math.inf
