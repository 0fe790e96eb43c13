"""Routed experts with gathering, SwiGLU and gates inside their products, on Hopper GPUs where quack-kernels is installed.

pip install 'meshloom[flash4]'. Elsewhere a mixture computes with grouped products of PyTorch.

Shape legend: see `operators.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F

from .. import limits
from ..trial import hopper_reason
from . import hopper, operators
from .logits import router_logits

_TOLERANCE = 0.03  # bf16 rounds by 0.002 to 0.004 a product


class FusedExperts:
    """The routed experts by these kernels. It is given the weights: the experts' module is not called, so hooks don't run."""

    def fits(self, x: torch.Tensor, w1: torch.Tensor, count: int) -> bool:
        """Return whether the kernels take this input and these widths. w1: (count · F, D)."""
        rows, dim = w1.shape
        return x.is_cuda and x.dtype == w1.dtype == torch.bfloat16 and limits.fused_swiglu_takes(dim, rows // count)

    def logits(self, x_TD: torch.Tensor, weight_ED: torch.Tensor) -> torch.Tensor:
        """Compute the router's logits in at least fp32: (T, E)."""
        return router_logits(x_TD, weight_ED)

    def __call__(
        self,
        x_TD: torch.Tensor,
        w1: torch.Tensor,
        w3: torch.Tensor,
        w2: torch.Tensor,
        gates_TK: torch.Tensor,
        order_N: torch.Tensor,
        inverse_TK: torch.Tensor,
        counts_E: torch.Tensor,
    ) -> torch.Tensor:
        """Return each token's expert outputs, weighted by its gates and summed: (T, D).

        order_N: the assignment, an index into (T, K), at each place sorted by expert; inverse_TK: its inverse. Every
        assignment must be counted.
        """
        token_N, place_TK = (order_N // inverse_TK.shape[1]).int(), inverse_TK.int()
        bounds_E1 = F.pad(counts_E.cumsum(0), (1, 0)).int()
        hidden_NF, both_N2F = operators.experts_up(x_TD, w1, w3, token_N, place_TK, bounds_E1)
        return operators.experts_down(hidden_NF, both_N2F, w2, gates_TK, token_N, place_TK, bounds_E1)


def compilations() -> dict[str, Callable[[torch.device], object]]:
    """Return what has each kernel compiled, by name, so that several processes may at once: a kernel takes seconds."""
    return {name: functools.partial(_compute_once, name) for name in _KERNELS}


_KERNELS = ("gated", "gated_backward", "rows by w2", "rows by gate and up", "weights of w2", "weights of gate and up")


def _compute_once(name: str, device: torch.device) -> None:
    """Compute one product of a mixture of zeros, whose layout in memory is that of a real one. name: of _KERNELS."""
    tokens, count, dim, width = 2 * limits.SWIGLU_UNIT, 2, 2 * limits.SWIGLU_UNIT, limits.SWIGLU_UNIT

    def zeros(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    x_TD, both_N2F, hidden_NF = zeros(tokens, dim), zeros(tokens, 2 * width), zeros(tokens, width)
    w_E2FD, w_EDF = zeros(count, 2 * width, dim), zeros(count, dim, width)
    token_N = torch.arange(tokens, dtype=torch.int32, device=device)
    bounds_E1 = torch.tensor([0, tokens // 2, tokens], dtype=torch.int32, device=device)
    if name == "gated":
        hopper.gated(x_TD, w_E2FD, token_N, bounds_E1)
    elif name == "gated_backward":
        hopper.gated_backward(x_TD, w_EDF, both_N2F, zeros(tokens, dtype=torch.float32), token_N, bounds_E1)
    elif name == "rows by w2":
        hopper.rows(hidden_NF, w_EDF.mT, bounds_E1)
    elif name == "rows by gate and up":
        hopper.rows(both_N2F, w_E2FD, bounds_E1)
    elif name == "weights of w2":
        hopper.weights(x_TD, hidden_NF, token_N, bounds_E1, w_EDF)
    else:
        hopper.weights(x_TD, both_N2F, token_N, bounds_E1, w_E2FD.mT)


@functools.cache
def unsupported_reason(device: torch.device) -> str | None:
    """Return why these kernels can't be used on a device; None if they can. Imports, compiles and tries them when first asked.

    Raises RuntimeError where the trial has left the GPU unusable.
    """
    return hopper_reason("experts' products with what stands around them inside", device, _error, _TOLERANCE)


def _error(device: torch.device) -> float:
    with torch.enable_grad():
        return trial_error(FusedExperts(), device, torch.bfloat16)


def trial_error(kernels: FusedExperts, device: torch.device, dtype: torch.dtype) -> float:
    """Measure the largest relative distance (Frobenius norms) of a small mixture and its gradients from the formula in fp64.

    Of its five experts one has no token, and the others' numbers of rows are no multiples of a tile.
    """
    draw = torch.Generator().manual_seed(0)
    tokens, top_k, count, dim, width = 333, 2, 5, 2 * limits.SWIGLU_UNIT, limits.SWIGLU_UNIT
    shapes = ((tokens, dim), (count * width, dim), (count * width, dim), (count * dim, width))
    drawn = [torch.randn(shape, generator=draw) / (1 if at == 0 else shape[1] ** 0.5) for at, shape in enumerate(shapes)]
    choice_TK = torch.rand(tokens, count - 1, generator=draw).topk(top_k, dim=-1).indices
    gates_TK, gradient = torch.rand(tokens, top_k, generator=draw), torch.randn(tokens, dim, generator=draw)
    rounded = [one.to(device, dtype) for one in drawn]
    order_N = choice_TK.flatten().argsort(stable=True)
    where = [
        each.to(device)
        for each in (order_N, order_N.argsort().view_as(choice_TK), choice_TK.flatten().bincount(minlength=count))
    ]
    wide = torch.promote_types(dtype, torch.float32)

    def fused(x: torch.Tensor, w1: torch.Tensor, w3: torch.Tensor, w2: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        return kernels(x, w1, w3, w2, gates, where[0], where[1], where[2])

    def plain(x: torch.Tensor, w1: torch.Tensor, w3: torch.Tensor, w2: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        weight_TE = torch.zeros(tokens, count, dtype=gates.dtype, device=device).scatter(1, choice_TK.to(device), gates)
        w1_EFD, w3_EFD, w2_EDF = (one.unflatten(0, (count, -1)) for one in (w1, w3, w2))
        hidden_TEF = F.silu(torch.einsum("td,efd->tef", x, w1_EFD)) * torch.einsum("td,efd->tef", x, w3_EFD)
        return torch.einsum("tef,edf,te->td", hidden_TEF, w2_EDF, weight_TE)

    found, expected = (
        (y := function(*own), *torch.autograd.grad(y, own, gradient.to(device, dtype).to(y.dtype)))
        for function, own in (
            (fused, [*(one.clone().requires_grad_() for one in rounded), gates_TK.to(device, wide).requires_grad_()]),
            (plain, [leaf.to(device, torch.float64).requires_grad_() for leaf in (*rounded, gates_TK)]),
        )
    )
    return max(((one - other).norm() / other.norm()).item() for one, other in zip(found, expected, strict=True))
