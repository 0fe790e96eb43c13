"""A → B → A over real engines: every bit comes back, and the loss curve goes on."""

from __future__ import annotations

from pathlib import Path

from meshloom.parallel.config import ParallelConfig
from support.checkpoint_layouts import Pair, Place, matrix

PAIRS = [  # all axes but that of experts, whose tests have pairs of their own; one split of layers in a V, one in a row
    Pair(
        Place(4, ParallelConfig(zero=3, replicate=2), 2, "full"),
        Place(4, ParallelConfig(zero=0, tp=2, pp=2, schedule="dualpipev"), 2, "none"),
        (("layers", 4), ("kv_heads", 4), ("tied", True)),
    ),
    Pair(
        Place(4, ParallelConfig(zero=1, tp=2, cp=2, sequence_parallel=False), 4, "none"),
        Place(4, ParallelConfig(zero=2, pp=2, schedule="gpipe"), 2, "selective"),
        (("layers", 4), ("kv_heads", 1)),
    ),
]


def test_layout_pairs_keep_every_bit_and_the_losses(tmp_path: Path) -> None:
    """`benchmarks/checkpoint_reshard.py` does many, on up to eight ranks, and others every time."""
    for result in matrix(PAIRS, tmp_path):
        assert result.fault() is None, (str(result.pair.here), str(result.pair.there))
