"""SwiGLU inside the matrix products around it, on Hopper GPUs where quack-kernels is installed: pip install 'meshloom[flash4]'.

The kernel of the product with the weights of gate and up also computes silu(gate) · up. The kernel of the backward product with
w2 also computes SwiGLU's gradient. So neither needs a pass over memory of its own. The backward kernel computes silu(gate) · up
again, so it is not kept. `torch.compile` does not trace these operators. quack compiles a kernel on first use (seconds), and
keeps it on disk.

The kernels take the rows of gate and up interleaved ("in turns"). The model's weights are not, so they are copied before use.

Shape legend: T tokens, D model width, F feed-forward width.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F

from . import limits
from .limits import SWIGLU_UNIT
from .trial import hopper_reason

_TOLERANCE = 0.03  # bf16 rounds by 0.002 to 0.004 a product


@functools.cache
def unsupported_reason(device: torch.device) -> str | None:
    """Return why these kernels can't be used on a device; None if they can. Imports, compiles and tries them when first asked.

    Raises RuntimeError where the trial has left the GPU unusable.
    """
    return hopper_reason("SwiGLU inside its products", device, _error, _TOLERANCE)


@torch.enable_grad()
def _error(device: torch.device) -> float:
    """Measure the largest relative distance (Frobenius norms) of a small product and its gradients from the formula in fp32."""
    draw = torch.Generator(device).manual_seed(0)
    dim, width = SWIGLU_UNIT, 2 * SWIGLU_UNIT
    shapes = ((width, dim), (width, dim), (dim, width))
    weights = [torch.randn(shape, device=device, generator=draw) / width**0.5 for shape in shapes]
    x, gradient = (torch.randn(width, dim, device=device, generator=draw) for _ in range(2))

    def plain(x: torch.Tensor, w1: torch.Tensor, w3: torch.Tensor, w2: torch.Tensor) -> torch.Tensor:
        return (F.silu(x @ w1.T) * (x @ w3.T)) @ w2.T

    found, expected = (
        (y := function(*own), *torch.autograd.grad(y, own, gradient.to(y.dtype)))
        for function, own in (
            (FusedSwiglu(), [leaf.bfloat16().requires_grad_() for leaf in (x, *weights)]),
            (plain, [leaf.requires_grad_() for leaf in (x, *weights)]),
        )
    )
    return max(((one - other).norm() / other.norm()).item() for one, other in zip(found, expected, strict=True))


@functools.cache
def package() -> ModuleType:
    """Import quack: seconds, the first time. A package that is not for this machine may raise anything."""
    from quack import gemm_interface  # pyright: ignore[reportMissingImports]

    return gemm_interface  # pyright: ignore[reportUnknownVariableType]


@functools.cache
def _tile() -> Any:
    """Return the fastest of eight tiles, forward and backward, for 32,768 tokens of widths 2,048 and 8,192 on H200."""
    from quack.gemm_config import GemmConfig  # pyright: ignore[reportMissingImports]

    return GemmConfig(
        tile_m=128, tile_n=192, pingpong=True, cluster_m=2, cluster_n=1, device_capacity=9, is_dynamic_persistent=False
    )


class FusedSwiglu:
    """A feed-forward by these kernels. It is given the weights: the projections' modules are not called, so hooks don't run."""

    def fits(self, x: torch.Tensor, w1_FD: torch.Tensor) -> bool:
        """Return whether the kernels take this input and the widths of this weight."""
        ffn_dim, dim = w1_FD.shape
        return x.is_cuda and x.dtype == torch.bfloat16 and limits.fused_swiglu_takes(dim, ffn_dim)

    def __call__(self, x_TD: torch.Tensor, w1_FD: torch.Tensor, w3_FD: torch.Tensor, w2_DF: torch.Tensor) -> torch.Tensor:
        """Return (silu(x w1ᵀ) · x w3ᵀ) w2ᵀ: (T, D), all bf16."""
        hidden_TF, both_T2F = swiglu_up(x_TD, w1_FD, w3_FD)
        return swiglu_down(hidden_TF, both_T2F, w2_DF)


def in_turns(w1_FD: torch.Tensor, w3_FD: torch.Tensor) -> torch.Tensor:
    """Interleave the rows of both: (2F, D)."""
    if not w1_FD.is_cuda:
        return torch.stack((w1_FD, w3_FD), 1).flatten(0, 1)
    from .triton_block import rows_in_turns

    return rows_in_turns(w1_FD, w3_FD)


def apart(both_2FD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Undo `in_turns`."""
    if not both_2FD.is_cuda:
        w1_FD, w3_FD = both_2FD.unflatten(0, (-1, 2)).unbind(1)
        return w1_FD.contiguous(), w3_FD.contiguous()
    from .triton_block import rows_apart

    return rows_apart(both_2FD)


@torch.library.custom_op("meshloom::swiglu_up", mutates_args=())
def swiglu_up(x_TD: torch.Tensor, w1_FD: torch.Tensor, w3_FD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute silu(gate) · up (T, F), without a gradient, and interleaved gate and up (T, 2F), which carry the gradient."""
    both, hidden = package().gemm_gated(x_TD, in_turns(w1_FD, w3_FD).T, activation="swiglu", config=_tile(), tuned=False)
    return hidden, both


@torch.library.custom_op("meshloom::swiglu_up_backward", mutates_args=())
def swiglu_up_backward(
    dboth_T2F: torch.Tensor, x_TD: torch.Tensor, w1_FD: torch.Tensor, w3_FD: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute the gradients of x, w1 and w3."""
    return dboth_T2F @ in_turns(w1_FD, w3_FD), *apart(dboth_T2F.T @ x_TD)


@torch.library.custom_op("meshloom::swiglu_down", mutates_args=())
def swiglu_down(hidden_TF: torch.Tensor, both_T2F: torch.Tensor, w2_DF: torch.Tensor) -> torch.Tensor:
    """Compute hidden · w2ᵀ. The gradient goes to `both_T2F`, from which hidden was computed."""
    return hidden_TF @ w2_DF.T


@torch.library.custom_op("meshloom::swiglu_down_backward", mutates_args=())
def swiglu_down_backward(dy_TD: torch.Tensor, both_T2F: torch.Tensor, w2_DF: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the gradients of w2 and of gate and up, interleaved."""
    dy_TD = dy_TD.contiguous()
    dboth, hidden = package().gemm_dgated(
        dy_TD, w2_DF, both_T2F, activation="swiglu", config=_tile(), tuned=False, dynamic_scheduler=True
    )
    return dboth, dy_TD.T @ hidden


def _shapes_up(x: torch.Tensor, w1: torch.Tensor, w3: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, width = x.shape[0], w1.shape[0]
    return x.new_empty(tokens, width), x.new_empty(tokens, 2 * width)


def _shapes_up_backward(dboth: torch.Tensor, x: torch.Tensor, w1: torch.Tensor, w3: torch.Tensor) -> Any:
    return x.new_empty(x.shape), w1.new_empty(w1.shape), w3.new_empty(w3.shape)


def _shape_down(hidden: torch.Tensor, both: torch.Tensor, w2: torch.Tensor) -> torch.Tensor:
    return hidden.new_empty(hidden.shape[0], w2.shape[0])


def _shapes_down_backward(dy: torch.Tensor, both: torch.Tensor, w2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return both.new_empty(both.shape), w2.new_empty(w2.shape)


def _keep_up(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs)
    ctx.mark_non_differentiable(output[0])
    ctx.set_materialize_grads(False)  # of the first output: there is none


def _differentiate_up(ctx: Any, _dhidden: None, dboth: torch.Tensor) -> Any:
    return swiglu_up_backward(dboth, *ctx.saved_tensors)


def _keep_down(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs[1:])


def _differentiate_down(ctx: Any, dy: torch.Tensor) -> Any:
    return None, *swiglu_down_backward(dy, *ctx.saved_tensors)


swiglu_up.register_fake(_shapes_up)
swiglu_up_backward.register_fake(_shapes_up_backward)
swiglu_down.register_fake(_shape_down)
swiglu_down_backward.register_fake(_shapes_down_backward)
swiglu_up.register_autograd(_differentiate_up, setup_context=_keep_up)
swiglu_down.register_autograd(_differentiate_down, setup_context=_keep_down)
