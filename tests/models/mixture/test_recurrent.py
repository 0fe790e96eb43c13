"""A recurrent router, held to PyTorch's own recurrent cell."""

from __future__ import annotations

from typing import Any

import torch

from meshloom.models.mixture.recurrent import RecurrentCell, next_state
from meshloom.models.mixture.router import CellWeights, Routed
from support.models import decoder

EXPERTS = {"count": 4, "top_k": 2, "ffn_dim": 6, "router": "recurrent", "state_dim": 5, "layers": [0, 2, 3]}


def drawn(module: torch.nn.Module) -> Any:
    draw = torch.Generator().manual_seed(3)
    for weight in module.parameters():
        torch.nn.init.normal_(weight, std=0.7, generator=draw)
    return module


def test_the_next_state_is_that_of_pytorchs_cell() -> None:
    cell = drawn(torch.nn.GRUCell(5, 5, dtype=torch.float64))
    draw = torch.Generator().manual_seed(4)
    x, h = (torch.randn(7, 5, generator=draw, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weights = [cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh]
    expected, got = cell(x, h), next_state(x, h, CellWeights(*weights))
    torch.testing.assert_close(got, expected, rtol=1e-14, atol=1e-14)
    wanted = torch.autograd.grad(expected.square().sum(), [x, h, *weights])
    for one, other in zip(torch.autograd.grad(got.square().sum(), [x, h, *weights]), wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_a_token_carries_its_state_from_mixture_to_mixture() -> None:
    """Through a layer without one, from zero, for each token by itself."""
    model = drawn(decoder(dim=16, layers=4, heads=2, kv_heads=2, ffn_dim=24, vocabulary=11, experts=EXPERTS).double())
    cell = torch.nn.GRUCell(5, 5, dtype=torch.float64)
    assert isinstance(model.router_cell, RecurrentCell)
    cell.load_state_dict(model.router_cell.state_dict())
    seen: list[tuple[Any, torch.Tensor, Routed]] = []
    for layer in EXPERTS["layers"]:  # type: ignore[union-attr]
        router = model.layers[str(layer)].ffn.router
        router.register_forward_hook(lambda module, inputs, routed: seen.append((module, inputs[0], routed)))
    model(torch.arange(10).view(2, 5), torch.ones(2, 5, dtype=torch.int64))
    state = None
    assert len(seen) == 3
    for router, x_TD, routed in seen:
        state = cell(x_TD @ router.project.T, state)
        p_TE = (state @ router.weight.T).softmax(-1)
        best = p_TE.topk(2, dim=-1)
        assert torch.equal(routed.choice_TK, best.indices)
        torch.testing.assert_close(routed.gates_TK, best.values / best.values.sum(-1, keepdim=True), rtol=1e-12, atol=1e-12)
