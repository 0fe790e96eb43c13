"""Bytes that a step moves in memory, beside those of the operations that are called."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from meshloom.kernels.rounding import round_stochastic, split_in_two
from meshloom.planner.traffic import ROUNDING


class CountedBytes(TorchDispatchMode):
    """Counts what operations read and write; views move nothing."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(each.alias_info is not None and not each.alias_info.is_write for each in func._schema.returns):
            return result
        read = args[1:] if func is torch.ops.aten.copy_.default else args
        moved = [*{id(each): each for each in tree_leaves(read)}.values(), *tree_leaves(result)]  # x == x reads x once
        self.total += sum(each.nbytes for each in moved if isinstance(each, torch.Tensor))
        return result


def test_rounding_moves_the_bytes_that_are_counted() -> None:
    shape, copy = (256, 512), torch.zeros(256, 512, dtype=torch.bfloat16)
    left, master = torch.zeros_like(copy), torch.randn(shape)
    unwritten = 2  # of the computation's copy, by the update
    with CountedBytes() as kahan:
        master.copy_(copy).add_(left)
        split_in_two(master, copy, left)
    assert kahan.total / master.numel() - unwritten == ROUNDING["bf16_kahan"]
    with CountedBytes() as chance:
        master.copy_(copy)
        round_stochastic(master, copy, key=5, global_shape=shape, offsets=(0, 0))
    assert chance.total / master.numel() - unwritten == pytest.approx(ROUNDING["bf16_stochastic"], rel=2e-3)
