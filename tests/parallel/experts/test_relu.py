"""ReLU routers and their objectives on every layout, by the trainer's own loop, held to plain formulas in a bare one (fp64)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from meshloom.models.mixture.balance_config import BalanceConfig
from meshloom.parallel.config import ParallelConfig
from meshloom.parallel.experts.chunk_rate import ChunkRate
from support.checkpoint_layouts import Pair, Place, matrix
from support.parity import Work
from support.parity_table import ParityTable

TOLERANCE = 1e-9
EXPERTS = {"count": 6, "top_k": 6, "ffn_dim": 7, "router": "relu", "gated": False}
BALANCED = {"global_batch": 0.5, "counts": "exact"}
SPARSE = {"locality": 0.3, "steepness": 3.0, "chunk_sparsity": 0.4, "chunk_length": 5, "chunk_steady": 1, "chunk_adjust": 1}
ALL = {**BALANCED, **SPARSE}


def work(micro: int, balance: dict[str, Any] = ALL, activation: str = "none", layers: int = 2, **settings: Any) -> Work:
    parallel = ParallelConfig(**settings)
    model = (("experts", EXPERTS), ("layers", layers))
    return Work(
        parallel,
        micro,
        8 if parallel.pp == 1 else 4,
        steps=3,
        lr=2e-3,
        activation=activation,
        model=model,
        balance=tuple(balance.items()),
    )


TABLE = ParityTable(
    {
        "one process": (1, work(3, zero=0)),
        "recomputed": (1, work(8, activation="full", zero=0)),
        "ZeRO-3": (2, work(2, zero=3)),
        "tp 2": (2, work(3, BALANCED, tp=2, zero=0)),
        "cp 2": (2, work(2, BALANCED, cp=2)),
        "ep 2, ZeRO-1": (2, work(1, ep=2, zero=1)),
        "pp 2, zbv": (2, work(1, layers=4, pp=2, schedule="zbv")),
        "ep 2 × pp 2, ZeRO-3, recomputed": (4, work(1, activation="full", pp=2, ep=2, zero=3)),
    }
)


@pytest.mark.parametrize("name", TABLE.names())
def test_a_relu_router_trains_the_same_run_on_every_layout(name: str) -> None:
    found = TABLE.difference(name)
    assert found.worst < TOLERANCE, found


def test_the_coefficient_follows_the_objective() -> None:
    """Windows of two steps, means 0.4, 0.5, 0.505, 0.25, 0.4. The first change is after step 4, of growth less than 1.025."""
    config = BalanceConfig(chunk_sparsity=2.0, chunk_steady=4, chunk_adjust=2)
    follower, rates = ChunkRate(config, torch.device("cpu")), list[float]()
    for objective in (0.3, 0.5, 0.4, 0.6, 0.6, 0.41, 0.2, 0.3, 0.3, 0.5):
        follower.observe(torch.tensor(objective, dtype=torch.float64))
        rates.append(float(follower.rate))
    third = 2.0 * 1.025
    fourth = third * 0.25 / 0.505
    assert rates == pytest.approx([2, 2, 2, 2, 2, third, third, fourth, fourth, fourth * 0.4 / 0.25])


def test_a_checkpoint_goes_on_elsewhere_with_the_coefficient(tmp_path: Path) -> None:
    here = Place(2, ParallelConfig(zero=3, ep=2), 1, "none")
    there = Place(2, ParallelConfig(zero=1, pp=2), 2, "full")
    (result,) = matrix([Pair(here, there, (("experts", EXPERTS),), tuple(SPARSE.items()))], tmp_path)
    assert result.fault() is None
