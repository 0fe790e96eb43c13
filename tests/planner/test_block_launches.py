"""Launches of a block that plans count, held to the operations that eager blocks dispatch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from meshloom.kernels.attention import CausalAttention
from meshloom.models.block import Block, BlockKernels
from meshloom.models.config import DecoderConfig
from meshloom.models.mixture.config import ExpertsConfig
from meshloom.models.rotary import rotary_table
from meshloom.planner.block_time import KERNELS, MIXTURE_LAUNCHES
from meshloom.planner.software import EAGER

NO_KERNEL = ("detach", "empty", "_unsafe_view", "alias", "promote_types")
TOKENS = 64


class Dispatched(TorchDispatchMode):
    """Counts operations that compute: those that neither make a view nor only allocate."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:  # as torch calls it
        self.count += not (func.is_view or any(name in str(func) for name in NO_KERNEL))
        return func(*args, **(kwargs or {}))


def launches(shape: DecoderConfig) -> int:
    """Count the operations of an eager block both ways."""
    block = Block(shape.block(0)).to(torch.bfloat16)
    block.use_kernels(BlockKernels(CausalAttention("cudnn")))
    for weight in block.parameters():
        torch.nn.init.normal_(weight, std=0.02)
    x = torch.randn(1, TOKENS, shape.dim, dtype=torch.bfloat16, requires_grad=True)
    rotary = shape.rotary("full")
    assert rotary is not None
    table = rotary_table(torch.arange(TOKENS, dtype=torch.float32), rotary)
    found = Dispatched()

    def counted(run: Callable[[], Any]) -> Any:
        with found:
            return run()

    y = counted(lambda: block(x, table, None)[0])
    counted(lambda: torch.autograd.grad(y, (x, *block.parameters()), torch.ones_like(y), allow_unused=True))
    return found.count


def test_eager_blocks_and_mixtures_dispatch_what_plans_count() -> None:
    """Routing's kernels stay kernels, where a compiler would join others: 2.5 and 1.4 are rounded."""
    dense = DecoderConfig(dim=64, layers=1, heads=4, kv_heads=2, ffn_dim=128, vocabulary=512)
    mixed = DecoderConfig(
        dim=64, layers=1, heads=4, kv_heads=2, ffn_dim=128, vocabulary=512,
        experts=ExpertsConfig(count=4, top_k=2, ffn_dim=32),
    )  # fmt: skip
    alone, routed = launches(dense), launches(mixed)
    assert alone / (3 * KERNELS) == pytest.approx(EAGER.launches, rel=0.15)
    assert routed / alone == pytest.approx(MIXTURE_LAUNCHES, rel=0.05)
