"""Plain stand-ins for kernels of GPUs, so that what is built around them runs on a CPU."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from meshloom.kernels import limits, norm, swiglu


def gemm_gated(x: torch.Tensor, w: torch.Tensor, **_how: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """quack's product that ends in SwiGLU: columns of gate and up in turns."""
    both = x @ w
    return both, F.silu(both[:, ::2]) * both[:, 1::2]


def gemm_dgated(dy: torch.Tensor, w: torch.Tensor, both: torch.Tensor, **_how: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """quack's product that ends in SwiGLU's gradient."""
    gate, up, dhidden = both[:, ::2], both[:, 1::2], dy @ w
    sigmoid = gate.sigmoid()
    dgate = dhidden * up * sigmoid * (1 + gate * (1 - sigmoid))
    return torch.stack((dgate, dhidden * gate * sigmoid), 2).flatten(1), gate * sigmoid * up


def norm_backward_rows(
    x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor, gradients: Sequence[torch.Tensor], eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The Triton kernel's formula."""
    inverse = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    gradient, unit = torch.stack(list(gradients)).sum(0), x * inverse
    scaled = gradient * weight
    dx = (scaled - unit * (scaled * unit).mean(-1, keepdim=True)) * inverse + residual
    return dx, (gradient * unit).flatten(0, -2).sum(0)


def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Put plain torch in the kernels' place, until the patch is undone. The list grows with each call."""
    made: list[str] = []

    def noted(kernel: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **how: Any) -> Any:
            made.append(kernel.__name__)
            return kernel(*args, **how)

        return call

    package = SimpleNamespace(gemm_gated=noted(gemm_gated), gemm_dgated=noted(gemm_dgated))
    monkeypatch.setattr(swiglu, "package", lambda: package)
    monkeypatch.setattr(swiglu, "_tile", lambda: None)
    monkeypatch.setattr(swiglu.FusedSwiglu, "fits", lambda *_: True)
    monkeypatch.setattr(limits, "fused_swiglu_takes", lambda *_: True)
    monkeypatch.setattr(norm.FusedNorm, "fits", lambda *_: True)
    kernels = SimpleNamespace(norm_backward_rows=noted(norm_backward_rows))
    monkeypatch.setitem(sys.modules, "meshloom.kernels.triton_block", kernels)
    monkeypatch.setattr("meshloom.kernels.triton_block", kernels, raising=False)
    return made
