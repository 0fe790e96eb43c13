"""Clipping of the outer momentum, beside CO2's formula in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from meshloom.optim.local.config import LocalConfig
from meshloom.optim.local.outer import outer_step


@pytest.mark.parametrize("nesterov", [False, True])
def test_outer_momentum_is_clipped_by_elements(nesterov: bool) -> None:
    """Also the one that is kept, which the authors' code forgets."""
    config = LocalConfig(islands=2, lr=0.5, momentum=0.8, nesterov=nesterov, clip=1.0)
    rng = np.random.default_rng(0)
    x, m = rng.normal(size=8), np.zeros(8)
    weight, momentum = torch.from_numpy(x.copy()), torch.from_numpy(m.copy())
    cut = 0
    for _ in range(4):
        d = rng.normal(size=8)
        unbounded = 0.8 * m + d
        cut += int((abs(unbounded) > 1).sum())
        m = np.clip(unbounded, -1, 1)
        x = x - 0.5 * (d + 0.8 * m if nesterov else m)
        outer_step(config, [weight], [momentum], [torch.from_numpy(d)])
        assert weight.numpy() == pytest.approx(x, rel=1e-12) and momentum.numpy() == pytest.approx(m, rel=1e-12)
    assert 0 < cut < 32
