"""A ReLU router and its objectives, held to loops over tokens, and to PyTorch's own losses differentiated by autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from meshloom.models.mixture.charges import OTHERS, Charges, Rates
from meshloom.models.mixture.config import ExpertsConfig, MixtureConfig
from meshloom.models.mixture.mixture import Mixture
from meshloom.models.mixture.sparsity import charge_chunks, charge_locality, chunk_sum, locality_sum
from meshloom.models.part_config import FeedForwardConfig, MatrixScales

DIM, WIDTH, COUNT = 6, 4, 5


def mixture(**keys: Any) -> Mixture:
    experts = ExpertsConfig.of({"count": COUNT, "top_k": COUNT, "router": "relu", "gated": False, **keys})
    assert list(experts.problems("model.experts", 1)) == []
    made = Mixture(MixtureConfig(FeedForwardConfig(DIM, WIDTH, MatrixScales(1.0, 1.0, 1.0)), experts)).double()
    draw = torch.Generator().manual_seed(3)
    for weight in made.parameters():
        torch.nn.init.normal_(weight, generator=draw)
    return made


def plainly(model: Mixture, x_BSD: torch.Tensor, most: int = COUNT) -> torch.Tensor:
    """Token by token, over all experts that act."""
    out: list[torch.Tensor] = []
    for x in x_BSD.reshape(-1, DIM):
        gates = F.rms_norm(F.relu(model.router.weight @ x), (COUNT,), model.router.gain, 1e-5)
        acting = sorted(range(COUNT), key=lambda expert: -float((model.router.weight[expert] @ x).detach()))[:most]
        y = torch.zeros_like(x)
        for expert in acting:
            if model.router.weight[expert] @ x > 0:
                wide, narrow = slice(expert * WIDTH, (expert + 1) * WIDTH), slice(expert * DIM, (expert + 1) * DIM)
                inner = F.silu(model.experts.w1[wide] @ x)
                if model.experts.w3 is not None:
                    inner = inner * (model.experts.w3[wide] @ x)
                y = y + gates[expert] * (model.experts.w2[narrow] @ inner)
        out.append(y)
    return torch.stack(out).view_as(x_BSD)


def inputs() -> torch.Tensor:
    x = torch.randn(2, 9, DIM, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    return x.requires_grad_()


@pytest.mark.parametrize(("gated", "most"), [(False, COUNT), (True, COUNT), (False, 2)])
def test_a_relu_router_is_a_loop_over_tokens_and_experts(gated: bool, most: int) -> None:
    model, x = mixture(gated=gated, top_k=most), inputs()
    with torch.no_grad():
        model.router.weight[3] = 0  # it acts for no token
        x[0, 0] = 0  # no expert acts for it
    expected = plainly(model, x, most)
    weights = [*model.parameters(), x]
    wanted = torch.autograd.grad(expected.square().sum(), weights)
    got, *_ = model([x] * model.num_inputs(x), None)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    for one, other in zip(torch.autograd.grad(got.square().sum(), weights), wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_only_acting_experts_are_counted() -> None:
    model, x = mixture(), inputs()
    counted = torch.ones(2, 9).bool()
    counted[1, 4:] = False
    *_, tally, _ = model(
        [x] * model.num_inputs(x), Charges(counted, torch.tensor(1.0, dtype=torch.float64), Rates(chunk_length=4))
    )
    active = (x @ model.router.weight.T > 0) & counted[..., None]
    assert tally is not None and tally.counts_E.tolist() == active.sum((0, 1)).tolist()
    assert 0 < int(tally.counts_E.sum()) < int(counted.sum()) * COUNT
    chunks = [(row, range(at, min(at + 4, 9))) for row in range(2) for at in (0, 4, 8)]
    touched = sum(
        float(active[row, list(chunk)].any(0).double().mean() * counted[row, list(chunk)].sum()) for row, chunk in chunks
    )
    assert float(tally.others_O[OTHERS.index("chunk_active")]) == pytest.approx(touched, rel=1e-12)
    assert float(tally.others_O[OTHERS.index("dropped")]) == 0


COUNTED = torch.tensor([[1, 1, 1, 0, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1, 1, 1]]).bool()


def test_locality_is_pytorchs_cross_entropy_of_neighbours() -> None:
    draw = torch.Generator().manual_seed(5)
    logits = torch.randn(18, COUNT, generator=draw, dtype=torch.float64, requires_grad=True)
    rate, total = torch.tensor(0.3, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for row in range(2):
        for at in range(8):
            if COUNTED[row, at] and COUNTED[row, at + 1]:
                one, other = logits[9 * row + at] * 3, logits[9 * row + at + 1] * 3
                total = total + F.binary_cross_entropy_with_logits(one, other.sigmoid())
    torch.testing.assert_close(locality_sum(logits.detach(), COUNTED, 3.0), total.detach(), rtol=1e-12, atol=0)
    (expected,) = torch.autograd.grad(rate * total, logits)
    (got,) = torch.autograd.grad(0 * charge_locality(logits, rate, COUNTED, 3.0).sum(), logits)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


def test_chunk_sparsity_is_the_chance_that_a_chunk_uses_an_expert() -> None:
    draw = torch.Generator().manual_seed(6)
    p = torch.rand(18, COUNT, generator=draw, dtype=torch.float64)
    p[2, 1] = p[5, 2] = p[6, 2] = 1.0  # one certain use, and two in one chunk
    p.requires_grad_()
    rate, total = torch.tensor(0.3, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for row in range(2):
        for start in (0, 4, 8):
            tokens = [at for at in range(start, min(start + 4, 9)) if COUNTED[row, at]]
            for expert in range(COUNT):
                unused = torch.ones((), dtype=torch.float64)
                for at in tokens:
                    unused = unused * (1 - p[9 * row + at, expert])
                total = total + len(tokens) / COUNT * (1 - unused)
    torch.testing.assert_close(chunk_sum(p.detach(), COUNTED, 4), total.detach(), rtol=1e-12, atol=0)
    (expected,) = torch.autograd.grad(rate * total, p)
    (got,) = torch.autograd.grad(0 * charge_chunks(p, rate, COUNTED, 4).sum(), p)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


def test_a_charged_router_has_the_gradient_of_the_objectives() -> None:
    model, x = mixture(), inputs()
    unit, rates = torch.tensor(0.1, dtype=torch.float64), Rates(locality=0.2, steepness=3.0, chunk_length=4)
    charges = Charges(COUNTED, unit, rates, chunk_rate=torch.tensor(0.7, dtype=torch.float64))
    y, *_ = model([x] * model.num_inputs(x), charges)
    got = torch.autograd.grad(y.square().sum(), [x, model.router.weight])
    logits = (x @ model.router.weight.T).flatten(0, 1)
    p = logits.relu() / (logits.relu().sum(-1, keepdim=True) + 1e-5)
    steep = logits.view(2, 9, -1) * 3
    bce = F.binary_cross_entropy_with_logits(steep[:, :-1], steep[:, 1:].sigmoid(), reduction="none").mean(-1)
    locality = (bce * (COUNTED[:, :-1] & COUNTED[:, 1:])).sum()
    q = F.pad(1 - p.view(2, 9, -1) * COUNTED[..., None], (0, 0, 0, 3), value=1.0).view(2, 3, 4, -1)
    chunks = ((1 - q.prod(2)).mean(-1) * F.pad(COUNTED, (0, 3)).view(2, 3, 4).sum(2)).sum()
    plain, *_ = model([x] * model.num_inputs(x), None)
    loss = plain.square().sum() + 0.1 * (0.2 * locality + 0.7 * chunks)
    for one, other in zip(got, torch.autograd.grad(loss, [x, model.router.weight]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_one_expert_for_a_whole_chunk_is_the_least() -> None:
    one_hot = torch.zeros(8, COUNT).double()
    one_hot[:, 2] = 1
    assert float(chunk_sum(one_hot, torch.ones(1, 8).bool(), 8)) == 8 / COUNT
