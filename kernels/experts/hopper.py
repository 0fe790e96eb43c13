"""Grouped products by quack-kernels on Hopper GPUs, with what stands around them inside: `plain.py` says what each computes.

A product with gathered rows reads tokens where they lie, so no copy of a token is made for each of its experts. quack compiles
a kernel on first use (seconds), and keeps it on disk. Nothing waits for the device.

Shape legend: see `plain.py`.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from ..swiglu import package


@functools.cache
def tile(tile_m: int, tile_n: int, pingpong: bool, cluster_m: int = 2) -> Any:
    """Return a configuration of a product. Products that gather rows take clusters along rows only."""
    from quack.gemm_config import GemmConfig  # pyright: ignore[reportMissingImports]

    return GemmConfig(
        tile_m=tile_m,
        tile_n=tile_n,
        pingpong=pingpong,
        cluster_m=cluster_m,
        cluster_n=1,
        device_capacity=9,
        is_dynamic_persistent=False,
    )


# The fastest of five tiles on H200, for 131,072 rows of 32 experts of width 1,024 and 262,144 rows of 64 experts of width 512,
# model width 2,048 (benchmarks/expert_products.py). The backward product with SwiGLU inside takes twice as long with others.
_ROWS = (128, 192, True)
_GATED = (128, 256, False)
_GATED_BACKWARD = (128, 128, True)
_WEIGHTS = (128, 256, False)


def _product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, config: Any, **more: Any) -> None:
    """Write a product. quack's public `gemm` takes no configuration; what it calls does."""
    package().gemm_tuned.fn(a, b, out, config=config, **more)


def rows(a_NI: torch.Tensor, w_EIO: torch.Tensor, bounds_E1: torch.Tensor, config: Any = None) -> torch.Tensor:
    """See `plain.rows`; rows behind the last bound are not written."""
    out_NO = a_NI.new_empty(len(a_NI), w_EIO.shape[2])
    _product(a_NI, w_EIO, out_NO, config or tile(*_ROWS), cu_seqlens_m=bounds_E1)
    return out_NO


def gated(
    x_TD: torch.Tensor, w_E2FD: torch.Tensor, token_N: torch.Tensor, bounds_E1: torch.Tensor, config: Any = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `plain.gated`."""
    both_N2F, hidden_NF = package().gemm_gated(
        x_TD,
        w_E2FD.mT,
        activation="swiglu",
        cu_seqlens_m=bounds_E1,
        A_idx=token_N,
        config=config or tile(*_GATED),
        tuned=False,
    )
    return hidden_NF, both_N2F


def gated_backward(
    dy_TD: torch.Tensor,
    w_EDF: torch.Tensor,
    both_N2F: torch.Tensor,
    gate_N: torch.Tensor,
    token_N: torch.Tensor,
    bounds_E1: torch.Tensor,
    config: Any = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `plain.gated_backward`."""
    dboth_N2F, hidden_NF, dgate_N = package().gemm_dgated(
        dy_TD,
        w_EDF,
        both_N2F,
        activation="swiglu",
        colvec_scale=gate_N,
        colvec_reduce=True,
        cu_seqlens_m=bounds_E1,
        A_idx=token_N,
        config=config or tile(*_GATED_BACKWARD),
        tuned=False,
        dynamic_scheduler=False,
    )
    return dboth_N2F, hidden_NF, dgate_N


def weights(
    x_TI: torch.Tensor,
    a_NO: torch.Tensor,
    token_N: torch.Tensor,
    bounds_E1: torch.Tensor,
    out_EIO: torch.Tensor,
    config: Any = None,
) -> None:
    """See `plain.weights`."""
    _product(x_TI.T, a_NO, out_EIO, config or tile(*_WEIGHTS), cu_seqlens_k=bounds_E1, A_idx=token_N)
