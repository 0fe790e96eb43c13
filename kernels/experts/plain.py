"""Grouped products by loops over the experts: on any device, in any precision, one expert's rows after another's.

They are what `hopper.py` is held to, and what the operators compute where there is no GPU. The host waits for the bounds.

Shape legend: T tokens, N rows sorted by expert, E experts, D model width, F an expert's width, I and O input and output width.
bounds_E1: int32, rows bounds_E1[e] to bounds_E1[e + 1] are expert e's. Rows behind the last bound are zero.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
import torch.nn.functional as F


def _rows_of(bounds_E1: torch.Tensor) -> Iterator[slice]:
    bounds = bounds_E1.tolist()
    return (slice(begin, end) for begin, end in itertools.pairwise(bounds))


def rows(a_NI: torch.Tensor, w_EIO: torch.Tensor, bounds_E1: torch.Tensor) -> torch.Tensor:
    """Multiply each row with its expert's matrix: (N, O)."""
    out_NO = a_NI.new_zeros(len(a_NI), w_EIO.shape[2])
    for w_IO, own in zip(w_EIO, _rows_of(bounds_E1), strict=True):
        out_NO[own] = a_NI[own] @ w_IO
    return out_NO


def gated(
    x_TD: torch.Tensor, w_E2FD: torch.Tensor, token_N: torch.Tensor, bounds_E1: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Multiply each row's token with gate and up, with rows in turns: silu(gate) · up (N, F), and both in turns (N, 2F)."""
    both_N2F = rows(x_TD[token_N], w_E2FD.mT, bounds_E1)
    gate_NF, up_NF = both_N2F.unflatten(1, (-1, 2)).unbind(2)
    return F.silu(gate_NF) * up_NF, both_N2F


def gated_backward(
    dy_TD: torch.Tensor,
    w_EDF: torch.Tensor,
    both_N2F: torch.Tensor,
    gate_N: torch.Tensor,
    token_N: torch.Tensor,
    bounds_E1: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Differentiate gate_n · w h_n by h's inputs and by the gate, h = silu(gate) · up.

    gate_N: the weight of each row's output. Returns the gradient of both in turns (N, 2F), gate_n · h_n (N, F), and the
    gradient of gate_N (N,), in its dtype.
    """
    gate_NF, up_NF = both_N2F.to(gate_N.dtype).unflatten(1, (-1, 2)).unbind(2)
    slope_NF = gate_NF.sigmoid()
    silu_NF = gate_NF * slope_NF
    hidden_NF = silu_NF * up_NF
    dh_NF = rows(dy_TD[token_N], w_EDF, bounds_E1).to(gate_N.dtype)
    own_NF = dh_NF * gate_N[:, None]
    dgate_NF = own_NF * up_NF * slope_NF * (1 + gate_NF * (1 - slope_NF))
    dboth_N2F = torch.stack([dgate_NF, own_NF * silu_NF], 2).flatten(1)
    dtype = both_N2F.dtype
    return dboth_N2F.to(dtype), (hidden_NF * gate_N[:, None]).to(dtype), (dh_NF * hidden_NF).sum(1)


def weights(
    x_TI: torch.Tensor, a_NO: torch.Tensor, token_N: torch.Tensor, bounds_E1: torch.Tensor, out_EIO: torch.Tensor
) -> None:
    """Sum x[token_n]ᵀ a_n over each expert's rows, into `out`, of any strides. Zero for an expert without rows."""
    rows_NI = x_TI[token_N]
    for out_IO, own in zip(out_EIO, _rows_of(bounds_E1), strict=True):
        out_IO.copy_(rows_NI[own].mT @ a_NO[own])
