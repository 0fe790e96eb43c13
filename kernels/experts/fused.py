"""Routed experts with gathering, SwiGLU and gates inside their products, on Hopper GPUs where quack-kernels is installed.

pip install 'meshloom[flash4]'. Elsewhere a mixture computes with grouped products of PyTorch.

Shape legend: see `operators.py`.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from .. import limits
from ..trial import survived
from . import operators

_TOLERANCE = 0.03  # bf16 rounds by 0.002 to 0.004 a product


class FusedExperts:
    """The routed experts by these kernels. It is given the weights: the experts' module is not called, so hooks don't run."""

    def fits(self, x: torch.Tensor, w1: torch.Tensor, count: int) -> bool:
        """Return whether the kernels take this input and these widths. w1: (count · F, D)."""
        rows, dim = w1.shape
        return x.is_cuda and x.dtype == w1.dtype == torch.bfloat16 and limits.fused_swiglu_takes(dim, rows // count)

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


@functools.cache
def unsupported_reason(device: torch.device) -> str | None:
    """Return why these kernels can't be used on a device; None if they can. Imports, compiles and tries them when first asked.

    Raises RuntimeError where the trial has left the GPU unusable.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
        return "it needs a Hopper GPU"
    try:
        with torch.enable_grad():
            worst = trial_error(FusedExperts(), device, torch.bfloat16)
    except Exception as error:  # not installed, or not for this Python, PyTorch or driver
        survived("experts' products with what stands around them inside", error, device)
        return f"{type(error).__name__}: {error}"
    return None if worst < _TOLERANCE else f"it is wrong by {worst:.1g}"


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
