"""The router's logits in fp32 from bf16 tokens and weights, without copies of them in fp32.

A product of two bf16 numbers is exact in fp32, so a bf16 product with sums and outputs in fp32 is the fp32 product of
both in another order of additions (and, on a matrix unit, without the last bits of a sum: 2e-6 off, where fp32's own
sums are 2e-7). In the backward pass the fp32 gradient of the logits is written as the sum of three bf16 numbers, which
hold all of its bits, and each is multiplied so.

Shape legend: T tokens, E experts, D model width.
"""

from __future__ import annotations

from typing import Any

import torch

PARTS = 3  # bf16 numbers of 8 bits each in an fp32 number of 24


def _exact_in_parts(tensor: torch.Tensor) -> bool:
    return tensor.is_cuda and tensor.dtype == torch.bfloat16


def bf16_parts(wide_TE: torch.Tensor) -> torch.Tensor:
    """Write an fp32 matrix as the sum of PARTS bf16 ones, side by side: (T, PARTS · E)."""
    parts: list[torch.Tensor] = []
    for _ in range(PARTS):
        parts.append(wide_TE.bfloat16())
        wide_TE = wide_TE - parts[-1]
    return torch.cat(parts, dim=1)


@torch.library.custom_op("meshloom::router_logits", mutates_args=())
def router_logits(x_TD: torch.Tensor, weight_ED: torch.Tensor) -> torch.Tensor:
    """Compute x · weightᵀ in at least fp32: (T, E)."""
    if _exact_in_parts(x_TD):
        return torch.mm(x_TD, weight_ED.T, out_dtype=torch.float32)
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    return x_TD.to(wide) @ weight_ED.to(wide).T


@torch.library.custom_op("meshloom::router_logits_backward", mutates_args=())
def router_logits_backward(
    dlogits_TE: torch.Tensor, x_TD: torch.Tensor, weight_ED: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the gradients of x and weight, each in its dtype."""
    if _exact_in_parts(x_TD):
        parts = bf16_parts(dlogits_TE)
        dx_TD = parts @ weight_ED.repeat(PARTS, 1)
        sums = torch.mm(parts.T, x_TD, out_dtype=torch.float32)
        return dx_TD, sums.unflatten(0, (PARTS, -1)).sum(0).to(weight_ED.dtype)
    wide = dlogits_TE.dtype
    dx_TD, dweight_ED = dlogits_TE @ weight_ED.to(wide), dlogits_TE.T @ x_TD.to(wide)
    return dx_TD.to(x_TD.dtype), dweight_ED.to(weight_ED.dtype)


@router_logits.register_fake
def _(x_TD: torch.Tensor, weight_ED: torch.Tensor) -> torch.Tensor:
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    return x_TD.new_empty((x_TD.shape[0], weight_ED.shape[0]), dtype=wide)


@router_logits_backward.register_fake
def _(dlogits_TE: torch.Tensor, x_TD: torch.Tensor, weight_ED: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x_TD.new_empty(x_TD.shape), weight_ED.new_empty(weight_ED.shape)


def _keep(ctx: Any, inputs: Any, output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, dlogits_TE: torch.Tensor) -> Any:
    return router_logits_backward(dlogits_TE, *ctx.saved_tensors)


router_logits.register_autograd(_differentiate, setup_context=_keep)
