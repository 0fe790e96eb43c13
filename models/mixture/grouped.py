"""Grouped products: rows sorted by expert, each times its expert's matrix.

Shape legend: N rows, E experts, I input width, O output width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

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
