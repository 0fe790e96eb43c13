"""A → B → A over real engines: every bit comes back, and the loss curve goes on."""

from __future__ import annotations

from pathlib import Path

from support.checkpoint_layouts import draw_pairs, matrix


def test_random_layout_pairs_keep_every_bit_and_the_losses(tmp_path: Path) -> None:
    """`benchmarks/checkpoint_reshard.py` does many, and others every time."""
    for result in matrix(draw_pairs(2026, 2), tmp_path):
        assert result.fault() is None, (str(result.pair.here), str(result.pair.there))
