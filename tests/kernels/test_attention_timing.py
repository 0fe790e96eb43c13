"""The fastest attention kernel is chosen; noise and kernels that can't run don't choose."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.attention import SDPBackend

from meshloom.kernels import attention_timing, flash4
from meshloom.kernels.attention import CUDA_BACKENDS
from meshloom.kernels.attention_blocks import Kernel


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
def test_the_fastest_is_chosen(cudnn: float, flash: float, flash4: float, chosen: str) -> None:
    assert attention_timing.fastest({"cudnn": cudnn, "flash": flash, "flash4": flash4}) == chosen


def test_all_pytorch_kernels_are_tried_chosen_one_first() -> None:
    assert CUDA_BACKENDS["cudnn"][0] is SDPBackend.CUDNN_ATTENTION and CUDA_BACKENDS["flash"][0] is SDPBackend.FLASH_ATTENTION
    assert len({frozenset(backends) for backends in CUDA_BACKENDS.values()}) == 1


def test_flash_attention_4_says_why_it_is_not_used() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: tests/kernels/test_gpu_flash4.py")
    assert flash4.unsupported_reason() == "there is no GPU"
    assert (
        attention_timing.unsupported_reason("flash4", attention_timing.Shape(64, 2, 2, 64), torch.device("cpu"))
        == "there is no GPU"
    )


@pytest.mark.parametrize(("head_dim", "takes"), [(8, True), (12, False), (96, True), (128, True), (136, False), (256, False)])
def test_flash_attention_4_skips_unsupported_head_widths(head_dim: int, takes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash4, "unsupported_reason", lambda: None)
    reason = attention_timing.unsupported_reason("flash4", attention_timing.Shape(64, 2, 2, head_dim), torch.device("cpu"))
    assert (reason is None) == takes
    assert takes or (reason is not None and reason.endswith(f"multiples of 8 up to 128, not {head_dim}"))


@pytest.mark.parametrize("kernel", ["cudnn", "flash"])
def test_pytorch_is_asked_about_its_own_kernels(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, tuple[int, ...], tuple[int, ...], bool, bool]] = []
    for name in ("cudnn", "flash"):

        def can_use(params: torch.backends.cuda.SDPAParams, name: str = name) -> bool:
            q, k = params.query, params.key
            asked.append((name, tuple(q.shape), tuple(k.shape), q.requires_grad, params.enable_gqa))
            return q.shape[-1] <= 128

        monkeypatch.setattr(attention_timing, f"can_use_{name}_attention", can_use)
    cpu = torch.device("cpu")
    assert attention_timing.unsupported_reason(kernel, attention_timing.Shape(32, 4, 2, 64), cpu) is None
    reason = attention_timing.unsupported_reason(kernel, attention_timing.Shape(32, 4, 4, 256), cpu)
    assert reason is not None and "head_dim=256" in reason
    assert asked == [
        (kernel, (1, 4, 32, 64), (1, 2, 32, 64), True, True),
        (kernel, (1, 4, 32, 256), (1, 4, 32, 256), True, False),
    ]


@pytest.mark.gpu
def test_kernels_are_timed_and_what_cant_run_takes_forever() -> None:
    device = torch.device("cuda")
    shape = attention_timing.Shape(1024, 4, 2, 64)
    assert all(0 < attention_timing.seconds(kernel, shape, device) < 1 for kernel in ("cudnn", "flash"))
    too_wide = attention_timing.Shape(1024, 4, 2, 512)
    assert attention_timing.seconds("flash", too_wide, device) == math.inf
    assert attention_timing.unsupported_reason("flash", too_wide, device) is not None
    assert all(attention_timing.unsupported_reason(kernel, shape, device) is None for kernel in ("cudnn", "flash"))


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [12, 96, 192, 256, 264])
@pytest.mark.parametrize("kernel", ["cudnn", "flash"])
def test_pytorch_computes_no_kernel_that_it_says_it_lacks(kernel: Kernel, head_dim: int) -> None:
    """Or a kernel would be left out that is there."""
    shape, device = attention_timing.Shape(512, 4, 2, head_dim), torch.device("cuda")
    if attention_timing.unsupported_reason(kernel, shape, device) is None:
        pytest.skip(f"{kernel} should take {head_dim} here")
    assert attention_timing.seconds(kernel, shape, device) == math.inf
