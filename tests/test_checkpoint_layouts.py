"""A → B → A over real engines: every bit comes back, and the loss curve goes on."""

from __future__ import annotations

import random
from pathlib import Path

from checkpoint_layouts import draw_pairs, matrix


def test_random_pairs_of_layouts_keep_every_bit_and_the_loss_curve(tmp_path: Path) -> None:
    """Others every time; `benchmarks/checkpoint_reshard.py` does many."""
    seed = random.randrange(10**6)
    for result in matrix(draw_pairs(seed, 2), tmp_path):
        assert result.fault() is None, (seed, str(result.pair.here), str(result.pair.there))
