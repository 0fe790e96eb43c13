"""RMSNorm whose output feeds several matrix products. Its backward kernel also sums their gradients.

The forward pass, and the sum before it, are left to the compiler to fuse. The backward pass is one kernel that reads and writes
memory once: it sums the products' gradients, computes those of input and weight, and adds the residual's gradient.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
import torch.nn.functional as F

_HAS_TRITON = importlib.util.find_spec("triton") is not None
WIDEST = 8192  # a row lies in the registers of one program


class FusedNorm:
    """RMSNorm with a fused backward pass. It is given the weight: the norm's module is not called, so its hooks don't run."""

    def fits(self, x: torch.Tensor) -> bool:
        """Return whether there is a kernel for this input."""
        return _HAS_TRITON and x.is_cuda and x.dtype != torch.float64 and x.shape[-1] <= WIDEST

    def __call__(self, x: torch.Tensor, weight: torch.Tensor, eps: float, uses: int) -> tuple[torch.Tensor, ...]:
        """Return x itself, for the residual, and `uses` times RMSNorm(x) · weight over the last dim, each to be used once."""
        return _Normed.apply(x, weight, eps, uses)  # pyright: ignore[reportReturnType]


class _Normed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, uses: int) -> tuple[torch.Tensor, ...]:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        y = F.rms_norm(x, (x.shape[-1],), weight, eps)
        return x.view_as(x), *[y.view_as(y) for _ in range(uses)]

    @staticmethod
    def backward(ctx: Any, residual: torch.Tensor, *gradients: torch.Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        return *norm_backward(x, weight, residual, list(gradients), ctx.eps), None, None


@torch.library.custom_op("meshloom::norm_backward", mutates_args=())
def norm_backward(
    x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor, gradients: list[torch.Tensor], eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the gradients of x and weight; `residual` is x's gradient from the residual stream. Sums are fp32."""
    from .triton_block import norm_backward_rows

    return norm_backward_rows(x, weight, residual, gradients, eps)


def _shapes(x: torch.Tensor, weight: torch.Tensor, *_rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), torch.empty_like(weight)


norm_backward.register_fake(_shapes)
