"""Prices on router probabilities, held to the losses whose gradients they are, and faults that other programs have had."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from meshloom.models.mixture.charges import Charges, Rates, charge, count_assignments, prices, share_of
from meshloom.models.mixture.config import ExpertsConfig, MixtureConfig
from meshloom.models.mixture.mixture import Mixture
from meshloom.models.part_config import FeedForwardConfig, MatrixScales

COUNTS = torch.tensor([[3.0, 1.0, 0.0, 4.0]]).double()


def test_a_price_is_the_gradient_of_the_balance_loss() -> None:
    p = torch.rand(6, 4, dtype=torch.float64, requires_grad=True)
    counted = torch.tensor([1, 1, 0, 1, 1, 0]).bool()
    loss = 4 * (COUNTS[0] / COUNTS.sum() * p[counted].mean(0)).sum()
    (expected,) = torch.autograd.grad(loss, p)
    charged = charge(p, share_of(COUNTS) / 4, counted)
    (got,) = torch.autograd.grad(charged.sum() * 0, p)
    torch.testing.assert_close(got, expected, rtol=1e-14, atol=1e-16)


def test_even_loads_have_a_loss_of_one() -> None:
    even = torch.full((1, 8), 5.0)
    assert share_of(even).tolist() == [[1.0] * 8]
    assert float((share_of(even) * even / even.sum()).sum()) == 1.0


def test_global_shares_cost_no_more_than_micro_batches() -> None:
    # One domain per rank, each routed to its own expert (arXiv 2501.11873): micro-batch loss N_E, global loss 1.
    counts = 8 * torch.eye(4, dtype=torch.float64)
    p = torch.eye(4, dtype=torch.float64)
    micro = torch.stack([(share_of(counts[rank : rank + 1]) * p[rank]).sum() for rank in range(4)]).mean()
    assert float(micro) == 4.0
    assert float((share_of(counts.sum(0, keepdim=True)) * p.mean(0)).sum()) == 1.0


def test_padding_is_neither_counted_nor_charged() -> None:
    choice = torch.tensor([[0, 1], [2, 3], [0, 2], [1, 3]])
    counted = torch.tensor([[True, False], [False, True]])
    assert count_assignments(choice, counted, 4).tolist() == [[1, 1, 0, 0], [0, 1, 0, 1]]


def test_a_micro_batch_without_a_target_has_no_price() -> None:
    charges = Charges(torch.zeros(2, 2).bool(), torch.tensor(0.5).double(), Rates(0.0, 1.0, 1.0))
    price, micro, rows = prices(charges, torch.zeros(2, 4, dtype=torch.float64))
    assert not price.any()
    assert not micro.any()
    assert not rows.any()


class Largest(TorchDispatchMode):
    """Keeps the number of elements of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, tuple | list) else (out,):
            if isinstance(each, torch.Tensor):
                self.elements = max(self.elements, each.numel())
        return out


def test_no_tensor_has_tokens_times_chosen_times_experts() -> None:
    """A one-hot of the choice took 81 GB elsewhere (transformers issue 48131)."""
    tokens, experts, top_k, dim, width = 512, 64, 8, 4, 4
    keys = ExpertsConfig(count=experts, top_k=top_k)
    mixture = Mixture(MixtureConfig(FeedForwardConfig(dim, width, MatrixScales(0.02, 0.02, 1.0)), keys))
    for parameter in mixture.parameters():
        torch.nn.init.normal_(parameter)
    charges = Charges(torch.ones(2, tokens // 2).bool(), torch.tensor(1 / tokens), Rates(0.1, 0.1, 0.1, 0.1))
    x = torch.randn(2, tokens // 2, dim, requires_grad=True)
    with Largest() as largest:
        y, tally, _ = mixture([x] * mixture.num_inputs(x), charges)
        y.sum().backward()
    assert tally is not None and int(tally.counts_E.sum()) == tokens * top_k
    assert largest.elements <= tokens * max(experts, top_k * max(dim, width))
