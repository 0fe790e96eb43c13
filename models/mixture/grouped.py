"""Grouped products: rows sorted by expert, each times its expert's matrix.

Shape legend: N rows, E experts, I input width, O output width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""From rows (N, I) sorted by expert, matrices (E, O, I) and each expert's number of rows (E,) to (N, O)."""

ALIGNMENT = 16  # bytes that strides must be multiples of


def unsupported_reason(dtype: torch.dtype, *widths: int) -> str | None:
    """Return why `F.grouped_mm` can't compute products of these widths; None if it can."""
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"it does not know {str(dtype).removeprefix('torch.')}"
    unit = ALIGNMENT // dtype.itemsize
    if any(width % unit for width in widths):
        return f"widths of {', '.join(map(str, widths))} are not all multiples of {unit}"
    return None


def grouped_product(rows_NI: torch.Tensor, weight_EOI: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
    """Multiply each expert's rows with the transpose of its matrix: (N, O).

    counts_E: rows of each expert, int64. Rows behind the last expert's are not computed: they may hold anything.
    """
    if len(rows_NI) == 0:  # which `F.grouped_mm` refuses; the gradients are zeros
        return F.linear(rows_NI, weight_EOI[0])
    if unsupported_reason(rows_NI.dtype, *weight_EOI.shape[1:]) is None:
        return F.grouped_mm(rows_NI, weight_EOI.transpose(1, 2), offs=counts_E.cumsum(0, dtype=torch.int32))
    return loop_product(rows_NI, weight_EOI, counts_E)


def loop_product(rows_NI: torch.Tensor, weight_EOI: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
    """Compute the same by a loop over the experts, in any precision. The host waits for the counts."""
    counts = counts_E.tolist()
    *parts, rest = rows_NI.split([*counts, len(rows_NI) - sum(counts)])
    outputs = [F.linear(part, weight) for part, weight in zip(parts, weight_EOI.unbind(), strict=True)]
    return torch.cat([*outputs, rest.new_zeros(len(rest), weight_EOI.shape[1])])


@torch.library.custom_op("meshloom::add_expert_bias", mutates_args=())
def add_bias(rows_NO: torch.Tensor, bias_EO: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
    """Add each expert's bias to its rows. The gradient sums an expert's rows in their order: no atomics."""
    ends_E = counts_E.cumsum(0)
    places_N = torch.arange(len(rows_NO), device=rows_NO.device)
    expert_N = torch.searchsorted(ends_E, places_N, right=True).clamp(max=len(bias_EO) - 1)
    return rows_NO + bias_EO[expert_N]


@add_bias.register_fake
def _(rows_NO: torch.Tensor, bias_EO: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(rows_NO)


def _save_counts(ctx: Any, inputs: Any, output: torch.Tensor) -> None:
    ctx.save_for_backward(inputs[2])
    ctx.dtype = inputs[1].dtype


def _add_bias_backward(ctx: Any, grad_NO: torch.Tensor) -> Any:
    (counts_E,) = ctx.saved_tensors
    wide = torch.promote_types(grad_NO.dtype, torch.float32)
    rest = len(grad_NO) - counts_E.sum(0, keepdim=True)
    sums = torch.segment_reduce(grad_NO.to(wide).contiguous(), "sum", lengths=torch.cat([counts_E, rest]), unsafe=True)
    return grad_NO, sums[:-1].to(ctx.dtype), None


add_bias.register_autograd(_add_bias_backward, setup_context=_save_counts)
