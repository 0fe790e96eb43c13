"""A checkpoint that keeps results: what can't be used again is a message, not another result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from meshloom.parallel.kept_results import keeping


def keep_products() -> Callable[[Any], bool]:
    return lambda operation: operation == torch.ops.aten.mm.default


def gradient(region: Callable[[torch.Tensor], torch.Tensor], **settings: Any) -> torch.Tensor:
    x = torch.full((3, 3), 0.5, dtype=torch.float64, requires_grad=True)
    y = checkpoint(region, x, use_reentrant=False, **settings)
    return torch.autograd.grad(y.sum(), x)[0]


def keep(region: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    return gradient(region, context_fn=lambda: keeping(keep_products))


def test_a_kept_product_gives_the_same_gradient() -> None:
    assert torch.equal(keep(lambda x: (x @ x).sin().exp()), gradient(lambda x: (x @ x).sin().exp()))


def test_a_kept_result_that_is_changed_in_place_is_refused() -> None:
    with pytest.raises(RuntimeError, match="changed in place"):
        keep(lambda x: (x @ x).mul_(2.0).sin().exp())


def test_a_recomputation_that_does_more_is_refused() -> None:
    passes: list[None] = []

    def region(x: torch.Tensor) -> torch.Tensor:
        passes.append(None)
        return ((x @ x) if len(passes) == 1 else (x @ x) @ x).sin().sin().sin().exp()  # it stops once all is there

    with pytest.raises(RuntimeError, match="more often than the forward pass"):
        keep(region)
