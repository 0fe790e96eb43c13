"""Gather each token's rows and sum them: how expert outputs, and gradients of copies of a token, come together.

Every token sums its K rows in the order of its choices, so the result is the same every time: no atomics.

Shape legend: T tokens, K rows of a token, N rows, D width.
"""

from __future__ import annotations

import torch

from ..loss import runs_triton


def gather_sum(rows_ND: torch.Tensor, place_TK: torch.Tensor, gates_TK: torch.Tensor | None = None) -> torch.Tensor:
    """Return Σ_k gates[t, k] · rows[place[t, k]]: (T, D), in the rows' dtype; sums are in at least fp32.

    gates_TK: None for ones. place_TK: integers, all within the rows.
    """
    if runs_triton(rows_ND):
        from .triton_gather_sum import gather_sum_rows

        return gather_sum_rows(rows_ND, place_TK, gates_TK)
    wide = torch.promote_types(rows_ND.dtype, torch.float32)
    total_TD = torch.zeros(len(place_TK), rows_ND.shape[1], dtype=wide, device=rows_ND.device)
    for choice in range(place_TK.shape[1]):  # one of a token's rows at a time: no (T, K, D) in wide precision
        row_TD = rows_ND[place_TK[:, choice]].to(wide)
        total_TD += row_TD if gates_TK is None else row_TD * gates_TK[:, choice, None].to(wide)
    return total_TD.to(rows_ND.dtype)
