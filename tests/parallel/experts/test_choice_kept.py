"""Recomputation keeps the choice of experts: chosen again from rounded scores, a token's experts might be others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from meshloom.models.mixture.routing import choose_active, choose_experts
from meshloom.parallel.activation import apply_policies
from support.models import decoder


class Choices(TorchDispatchMode):
    """Counts how often experts are chosen."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (choose_experts._opoverload, choose_active._opoverload)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("router", ["top_k", "relu"])
@pytest.mark.parametrize("policy", ["none", "selective", "full", "offload"])
def test_each_layer_chooses_once_a_pass(policy: str, router: str) -> None:
    experts = {"count": 4, "top_k": 2, "ffn_dim": 6, "router": router}
    model = decoder(dim=16, layers=2, heads=2, kv_heads=2, ffn_dim=24, vocabulary=11, experts=experts)
    apply_policies(list(model.layers.values()), [policy] * 2)
    tokens = torch.arange(8).view(1, 8)
    with Choices() as chosen:
        model(tokens, tokens).backward()
    assert chosen.count == 2
