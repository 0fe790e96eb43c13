"""Recurrent routers on every layout, by the trainer's own loop, held to PyTorch's own recurrent cell in a bare loop (fp64)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from meshloom.parallel.config import ParallelConfig
from support.checkpoint_layouts import Pair, Place, matrix
from support.parity import Work
from support.parity_table import ParityTable

TOLERANCE = 1e-9
EXPERTS = {"count": 4, "top_k": 2, "ffn_dim": 7, "router": "recurrent", "state_dim": 5}
LATE = {**EXPERTS, "dense_layers": 2}
GAPS = {**EXPERTS, "layers": [0, 2, 3], "scores": "sigmoid", "bias": True}
ALL = {"global_batch": 0.5, "counts": "exact", "sequence": 0.2, "z_loss": 0.1}


def work(micro: int, experts: dict[str, Any] = EXPERTS, activation: str = "none", layers: int = 2, **settings: Any) -> Work:
    parallel = ParallelConfig(**settings)
    model = (("experts", experts), ("layers", layers))
    samples = 8 if parallel.pp == 1 else 4
    return Work(parallel, micro, samples, steps=2, lr=2e-3, activation=activation, model=model, balance=tuple(ALL.items()))


# Together: every axis and ZeRO stage; stages without a mixture, the first too; stages that share a rank.
TABLE = ParityTable(
    {
        "one process": (1, work(3, zero=0)),
        "recomputed": (1, work(8, GAPS, "full", 4, zero=0)),
        "ZeRO-1": (2, work(1, zero=1)),
        "ZeRO-3, selective": (2, work(2, GAPS, "selective", 4, zero=3)),
        "tp 2": (2, work(3, tp=2, zero=0)),
        "cp 2, ZeRO-2": (2, work(2, cp=2, zero=2)),
        "ep 2, ZeRO-3": (2, work(1, ep=2, zero=3)),
        "pp 2, 1f1b": (2, work(1, GAPS, layers=4, pp=2, schedule="1f1b")),
        "pp 2, gpipe, late": (2, work(1, LATE, layers=4, pp=2, schedule="gpipe")),
        "pp 2, interleaved": (2, work(1, GAPS, layers=4, pp=2, schedule="interleaved")),
        "pp 2 × tp 2": (4, work(1, GAPS, "full", 4, pp=2, tp=2)),
        "pp 2 × ZeRO-3, ep 2": (4, work(1, GAPS, layers=4, pp=2, zero=3, ep=2)),
    }
)


@pytest.mark.parametrize("name", TABLE.names())
def test_a_recurrent_router_trains_the_same_run_on_every_layout(name: str) -> None:
    found = TABLE.difference(name)
    assert found.worst < TOLERANCE, found


def test_a_checkpoint_holds_the_cell_once_and_goes_on_elsewhere(tmp_path: Path) -> None:
    here = Place(2, ParallelConfig(zero=3, pp=2, schedule="interleaved"), 1, "none")
    there = Place(2, ParallelConfig(zero=1, tp=2), 2, "full")
    (result,) = matrix([Pair(here, there, (("experts", GAPS), ("layers", 4)))], tmp_path)
    assert result.fault() is None
