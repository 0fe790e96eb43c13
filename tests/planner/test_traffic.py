"""Bytes that an update moves in memory, beside those of the arrays that it is given."""

from __future__ import annotations

import torch

from meshloom.kernels.random_bits import BoxIndex
from meshloom.kernels.rounding import KeptWeight
from meshloom.planner.traffic import ROUNDING, UPDATE


def test_an_update_moves_what_it_is_given() -> None:
    """Of AdamW in one pass: `kernels/triton_adamw.py`."""
    shape = (16, 32)
    master, first, second = (torch.zeros(shape) for _ in range(3))
    copy, gradient, remainder = (torch.zeros(shape, dtype=torch.bfloat16) for _ in range(3))
    box = BoxIndex.of(shape, shape, (0, 0))
    assert box is not None
    always = 2 * first.nbytes + 2 * second.nbytes + 2 * gradient.nbytes  # the gradient is read for its norm, too
    assert UPDATE * master.numel() == always + 2 * master.nbytes + copy.nbytes
    for kind, left in (("bf16_stochastic", None), ("bf16_kahan", remainder)):
        kept = KeptWeight(copy, left, 0, box)
        weight = kept.value.nbytes + (0 if kept.remainder is None else kept.remainder.nbytes)
        assert (UPDATE + ROUNDING[kind]) * master.numel() == always + 2 * weight
