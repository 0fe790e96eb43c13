"""The check that a model's blocks may compute SwiGLU inside the products around it."""

from __future__ import annotations

import pytest

from meshloom.models.config import decoder_config
from meshloom.parallel.config import ParallelConfig
from meshloom.parallel.engine import EngineSettings
from meshloom.parallel.policies import fused_swiglu_blocker

SIZES = {"vocabulary": 64, "dim": 256, "layers": 2, "heads": 4, "kv_heads": 4, "ffn_dim": 512}


@pytest.mark.parametrize(
    ("experts", "reason"),
    [
        ({}, "experts' products are grouped"),
        ({"shared": 1}, None),
        ({"dense_layers": 1}, None),
        ({"shared": 1, "ffn_dim": 7}, "its kernels don't take widths of 256 and 7"),
    ],
)
def test_of_a_mixture_dense_feed_forwards_are_asked(experts: dict[str, int], reason: str | None) -> None:
    shape = decoder_config({**SIZES, "experts": {"count": 4, "top_k": 2, **experts}})
    assert fused_swiglu_blocker(shape, ParallelConfig(), EngineSettings(seed=0, precision="bf16")) == reason
