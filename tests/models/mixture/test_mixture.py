"""A mixture of experts, held to a loop over tokens and experts in plain tensor arithmetic."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from meshloom.models.config import DecoderConfig
from meshloom.models.mixture.charges import Charges, Rates
from meshloom.models.mixture.config import MixtureConfig
from meshloom.models.mixture.dispatch import sort_by_expert
from meshloom.models.mixture.grouped import grouped_product, loop_product, unsupported_reason
from meshloom.models.mixture.mixture import Mixture
from meshloom.models.mixture.router import Carried, Routed, TopKRouter
from support.compiling import counted_graphs
from support.experts import plain_choice

DIM, WIDTH = 8, 4


def mixture(dtype: torch.dtype = torch.float64, gpt_oss: bool = False, **experts: Any) -> Mixture:
    keys = {"count": 6, "top_k": 2, "ffn_dim": WIDTH, **experts}
    shape = {"dim": DIM, "layers": 1, "heads": 2, "kv_heads": 2, "ffn_dim": 12, "vocabulary": 5}
    gate = {"ffn_bias": True, "ffn_activation": "clamped_swiglu"} if gpt_oss else {}
    config = DecoderConfig.of({**shape, **gate, "experts": keys})
    assert config.problems() == []
    ffn = config.block(0).ffn
    assert isinstance(ffn, MixtureConfig)
    made = Mixture(ffn).to(dtype)
    draw = torch.Generator().manual_seed(3)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=3.0 if gpt_oss else 1.0, generator=draw)  # large: the clamps act
    if made.router.bias is not None:
        made.router.bias.copy_(0.3 * torch.randn(6, generator=draw, dtype=torch.float64))
    return made


def inputs(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(3, 5, DIM, generator=torch.Generator().manual_seed(4), dtype=torch.float64).to(dtype)


def plainly(model: Mixture, x_BSD: torch.Tensor, capacity: int | None = None) -> tuple[torch.Tensor, int]:
    """Token by token: the output, and the number of assignments that found their expert full."""
    keys, room, dropped = model.keys, [capacity] * model.keys.count, 0
    out: list[torch.Tensor] = []
    for x in x_BSD.reshape(-1, DIM):
        logits = model.router.weight @ x + (0 if model.router.logit_bias is None else model.router.logit_bias)
        scores = logits.exp() / logits.exp().sum() if keys.scores == "softmax" else 1 / (1 + (-logits).exp())
        ranked = scores if model.router.bias is None else scores + model.router.bias
        chosen = plain_choice(ranked.tolist(), keys.top_k, keys.groups, keys.top_groups)
        total = sum((scores[expert] for expert in chosen), torch.zeros(())) if keys.renormalise else torch.ones(())
        y = torch.zeros_like(x)
        for expert in chosen:
            if capacity is not None and room[expert] == 0:
                dropped += 1
                continue
            room[expert] = None if capacity is None else room[expert] - 1  # type: ignore[operator]
            wide, narrow = slice(expert * WIDTH, (expert + 1) * WIDTH), slice(expert * DIM, (expert + 1) * DIM)
            w1, w3, w2 = model.experts.w1[wide], model.experts.w3[wide], model.experts.w2[narrow]
            gate, up = w1 @ x, w3 @ x
            if model.experts.b1 is None:
                out_of_expert = w2 @ (F.silu(gate) * up)
            else:
                gate, up = (gate + model.experts.b1[wide]).clamp(max=7), (up + model.experts.b3[wide]).clamp(-7, 7)
                out_of_expert = w2 @ (gate / (1 + (-1.702 * gate).exp()) * (up + 1)) + model.experts.b2[narrow]
            y = y + keys.scale * scores[expert] / total * out_of_expert
        if model.shared is not None:
            y = y + model.shared([x, x])
        out.append(y)
    return torch.stack(out).view_as(x_BSD), dropped


CASES: dict[str, dict[str, Any]] = {
    "softmax, renormalised": {},
    "softmax, two shared experts": {"renormalise": False, "shared": 2},
    "top 1": {"top_k": 1},
    "all experts": {"top_k": 6},
    "sigmoid, groups, bias, scale": {
        **{"scores": "sigmoid", "groups": 3, "top_groups": 2, "top_k": 3, "bias": True, "scale": 2.5},
    },
    "biases and clamps, as in gpt-oss": {"gpt_oss": True, "logit_bias": True},
    "groups of one": {"groups": 6, "top_groups": 4},
}


@pytest.mark.parametrize("name", CASES)
def test_a_mixture_is_a_loop_over_tokens_and_experts(name: str) -> None:
    model, x = mixture(**CASES[name]), inputs().requires_grad_()
    expected, _ = plainly(model, x)
    weights = [*model.parameters(), x]
    gradients = torch.autograd.grad(expected.square().sum(), weights)
    got, tally, _ = model([x] * model.num_inputs(x), None)
    assert tally is None
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    for one, other in zip(torch.autograd.grad(got.square().sum(), weights), gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("capacity", "most"), [(1.0, 5), (0.3, 2)])
def test_capacity_drops_the_last_tokens_and_counts_them(capacity: float, most: int) -> None:
    model, x = mixture(capacity=capacity), inputs().requires_grad_()
    expected, dropped = plainly(model, x, most)
    counted = torch.ones(3, 5, dtype=torch.bool)
    got, tally, _ = model([x] * model.num_inputs(x), Charges(counted, torch.tensor(1.0).double(), Rates()))
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    assert dropped > 0
    assert tally is not None
    assert tally.others_O[2] == dropped
    (gradient,) = torch.autograd.grad(got.square().sum(), x)
    (plain,) = torch.autograd.grad(expected.square().sum(), x)
    torch.testing.assert_close(gradient, plain, rtol=1e-10, atol=1e-10)


def test_padding_takes_no_room_from_tokens_that_count() -> None:
    """The first sequence is padding: the others lose no more assignments than without it, and those in their order."""
    model, x = mixture(capacity=0.6), inputs()
    counted = torch.ones(3, 5, dtype=torch.bool)
    counted[0] = False
    expected, dropped = plainly(model, x[1:], 3)  # ⌈0.6 · 30 / 6⌉
    got, tally, _ = model([x] * model.num_inputs(x), Charges(counted, torch.tensor(1.0).double(), Rates()))
    torch.testing.assert_close(got[1:], expected, rtol=1e-12, atol=1e-12)
    assert tally is not None and 0 < dropped == tally.others_O[2]


class FirstChoice(TopKRouter):
    """Takes the first of each token's choices, and leaves the others."""

    def forward(self, x_TD: torch.Tensor, charges: Charges | None, carried: Carried | None = None) -> Routed:
        routed = super().forward(x_TD, charges, carried)
        taken_TK = torch.zeros_like(routed.choice_TK, dtype=torch.bool)
        taken_TK[:, 0] = True
        return routed._replace(taken_TK=taken_TK)


def test_choices_that_are_not_taken_need_no_room_and_are_not_dropped() -> None:
    keys = {"renormalise": False, "capacity": 0.3}
    one, two, x = mixture(**keys | {"top_k": 1, "capacity": 0.6}), mixture(**keys), inputs()
    two.router = FirstChoice(two.config).double()
    two.load_state_dict(one.state_dict())
    counted = torch.ones(3, 5, dtype=torch.bool)
    counted[1, :3] = False
    charges = Charges(counted, torch.tensor(1.0).double(), Rates())
    (expected, tally, _), (got, other, _) = one([x, x], charges), two([x, x], charges)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    assert tally is not None and other is not None and tally.others_O[2] == other.others_O[2] > 0


@pytest.mark.parametrize("seed", range(4))
def test_an_expert_takes_the_first_that_count_of_the_choices_taken(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    choice, taken = torch.randint(3, (9, 2), generator=draw), torch.rand(9, 2, generator=draw) < 0.8
    counted = torch.rand(9, generator=draw) < 0.6
    found = sort_by_expert(choice, 3, 0.5, counted, taken)
    chosen = choice.flatten().tolist()
    places = [at for at in range(18) if taken.flatten()[at]]
    kept: list[int] = []
    for expert in range(3):
        queue = sorted((at for at in places if chosen[at] == expert), key=lambda at: not counted[at // 2])
        kept += sorted(queue[:3])  # 0.5 · 18 / 3
    assert found.counts_E.tolist() == [sum(chosen[at] == expert for at in kept) for expert in range(3)]
    assert found.order_N[: len(kept)].tolist() == kept and sorted(found.order_N.tolist()) == list(range(18))
    assert found.kept_TK is not None and found.kept_TK.flatten().nonzero().flatten().tolist() == sorted(kept)
    assert 0 < len(kept) < len(places) < 18


def test_enough_capacity_drops_nothing() -> None:
    model, x = mixture(capacity=3.0), inputs()
    torch.testing.assert_close(model([x] * model.num_inputs(x), None)[0], mixture()([x] * 2, None)[0], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_products_are_the_loop(dtype: torch.dtype) -> None:
    assert unsupported_reason(dtype, 16, 8) is None
    draw = torch.Generator().manual_seed(0)
    rows = torch.randn(12, 16, generator=draw).to(dtype).requires_grad_()
    weight = torch.randn(4, 8, 16, generator=draw).to(dtype).requires_grad_()
    counts = torch.tensor([5, 0, 4, 1])  # the last two rows are nobody's
    got, expected = (product(rows, weight, counts)[:10] for product in (grouped_product, loop_product))
    torch.testing.assert_close(got, expected)
    for one, other in zip(
        torch.autograd.grad(got.float().square().sum(), (rows, weight)),
        torch.autograd.grad(expected.float().square().sum(), (rows, weight)),
        strict=True,
    ):
        torch.testing.assert_close(one[:10] if one.dim() == 2 else one, other[:10] if other.dim() == 2 else other)


def test_the_loop_over_experts_compiles() -> None:
    """It is what a GPU runs, too, in fp32 or with dimensions that `F.grouped_mm` refuses."""
    draw = torch.Generator().manual_seed(0)
    rows = torch.randn(12, 5, generator=draw, dtype=torch.float64).requires_grad_()
    weight = torch.randn(4, 3, 5, generator=draw, dtype=torch.float64).requires_grad_()
    with counted_graphs() as counter:
        compiled = torch.compile(loop_product)
        for counts in ([5, 0, 4, 1], [1, 2, 3, 6]):
            got, expected = (product(rows, weight, torch.tensor(counts)) for product in (compiled, loop_product))
            torch.testing.assert_close(got, expected)
            gradients = [torch.autograd.grad(found.square().sum(), (rows, weight)) for found in (got, expected)]
            torch.testing.assert_close(*gradients)
    assert counter.frame_count > 0


def test_products_that_grouped_mm_refuses_have_a_reason() -> None:
    assert "float64" in str(unsupported_reason(torch.float64, 16, 16))
    assert "multiples of 8" in str(unsupported_reason(torch.bfloat16, 16, 12))


def test_router_computes_in_fp32_beside_bf16() -> None:
    model = mixture(torch.bfloat16)
    routed = model.router(inputs(torch.bfloat16).flatten(0, 1), None)
    assert routed.gates_TK.dtype == torch.float32
    assert model([inputs(torch.bfloat16)] * 2, None)[0].dtype == torch.bfloat16


def test_assignments_are_sorted_by_expert_in_token_order() -> None:
    choice = torch.tensor([[2, 0], [0, 1], [2, 0]])
    found = sort_by_expert(choice, 4)
    assert found.order_N.tolist() == [1, 2, 5, 3, 0, 4]
    assert found.counts_E.tolist() == [3, 1, 2, 0]
    dropped = sort_by_expert(choice, 4, capacity=2 / 3)  # one each
    assert dropped.order_N.tolist() == [1, 3, 0, 2, 4, 5]
    assert dropped.counts_E.tolist() == [1, 1, 1, 0]
