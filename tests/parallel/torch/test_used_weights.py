"""Ranks that use different weights of a user's own module in a step get the gradient of them all."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from meshloom.config.problems import ConfigError
from meshloom.data.batch import IGNORED, GlobalBatch, MicroBatch
from meshloom.models.build import build_model
from meshloom.models.config import DecoderConfig
from meshloom.models.decoder import Decoder
from meshloom.models.init import fill
from meshloom.models.protocol import Model
from meshloom.optim.optimizers.adamw import AdamW
from meshloom.optim.optimizers.config import AdamWConfig
from meshloom.parallel.config import ParallelConfig
from meshloom.parallel.engines import make_engine
from meshloom.parallel.gradient_noise import Measure
from meshloom.parallel.hybrid.cost import CostModel
from meshloom.parallel.hybrid.share import BatchDocuments, HybridAssigner
from meshloom.parallel.layout import Layout
from meshloom.parallel.mesh import Mesh
from meshloom.parallel.torch.engine import TorchEngine
from meshloom.parallel.weight_use import completion
from support import parity
from support.models import decoder
from support.parity import SEQ_LEN, VOCABULARY, UnevenSamples, Work, equal_share, sample, take_steps
from support.ranks import run_ranks
from support.routed import ROUTES, Routed, Skipping
from support.settings import settings_of

Route = tuple[int, ...]
Routes = Sequence[Sequence[Route]]
"""Of a step, by rank and micro-batch."""
Shards = dict[str, tuple[list[slice], torch.Tensor | None]]
"""By name of a weight: where a rank's rows of its gradient are, and they themselves; None: it has no gradient."""

WHOLE, BACKWARDS, FIRST, SECOND, TWICE, OTHER_TWICE, LAST, NONE = ROUTES
CASES: dict[str, list[Routes]] = {
    "from the first step on": [[[WHOLE], [FIRST]], [[NONE], [LAST]], [[WHOLE], [WHOLE]], [[SECOND], [WHOLE]]],
    "from the second on": [[[WHOLE], [WHOLE]], [[WHOLE], [SECOND]], [[FIRST], [FIRST]], [[LAST], [TWICE]]],
    "as many weights of one size": [[[FIRST], [SECOND]], [[SECOND], [FIRST]]],
    "no rank some": [[[NONE], [NONE]], [[FIRST], [FIRST]]],
    "in another order": [[[WHOLE], [BACKWARDS]]],
    "twice, in another order": [[[TWICE], [OTHER_TWICE]]],
    "not in the last micro-batch": [[[WHOLE, FIRST], [WHOLE, WHOLE]], [[WHOLE, NONE], [NONE, NONE]]],
    "the same in all, but others in the last": [[[FIRST, SECOND], [SECOND, FIRST]], [[LAST, WHOLE, NONE], [WHOLE, NONE, LAST]]],
}


def routed(**keys: Any) -> Model:
    kind = "Skipping" if "dim" in keys else "Routed"
    return build_model({"_target_": f"support.routed.{kind}", "name": "mine", **keys}, VOCABULARY)


def filled(**keys: Any) -> nn.Module:
    """The oracle: a module that Meshloom has not changed but for its initial values."""
    initial = routed(**keys).initial
    model = (Skipping(DecoderConfig.of(keys)) if "dim" in keys else Routed(VOCABULARY, **keys)).double()
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        fill(parameter.data, initial(name), seed=7, name=name, global_shape=shape, offsets=(0,) * len(shape))
    return model


def batches(routes: Sequence[Route], rank: int) -> list[MicroBatch]:
    """One sample for each route, which it takes."""
    samples = [sample(10 * rank + at) for at in range(len(routes))]
    for each, route in zip(samples, routes, strict=True):
        each.tokens[0] = ROUTES.index(route) + len(ROUTES)
    return [MicroBatch.collate([each]) for each in samples]


def plain_gradients(routes: Routes, **keys: Any) -> dict[str, torch.Tensor | None]:
    """The gradients of the sum over all ranks' micro-batches, by PyTorch alone."""
    model, everyone = filled(**keys), [each for rank, mine in enumerate(routes) for each in batches(mine, rank)]
    for each in everyone:
        logits, targets = model(each.tokens_BS), each.targets_BS
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")
        (loss / sum(one.valid_tokens for one in everyone)).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def engine_of(model: Model, parallel: ParallelConfig, world_size: int, precision: str = "fp64") -> TorchEngine:
    mesh = Mesh.connect(Layout.plan(parallel, world_size), torch.device("cpu"))
    make = functools.partial(AdamW, AdamWConfig(lr=1e-2, weight_decay=0.1, betas=[0.9, 0.95], eps=1e-8))
    engine = make_engine(model, mesh, make, parallel, settings_of(model, parallel, precision=precision, seed=7))  # type: ignore[arg-type]
    assert isinstance(engine, TorchEngine)
    return engine


def shards_of(engine: TorchEngine) -> Shards:
    found: Shards = {}
    for name, weight in engine.weights.local.items():
        box = weight.placed.box
        rows = [slice(begin, end) for begin, end in zip(box.offsets, box.ends, strict=True)]
        found[name] = rows, None if weight.tensor.grad is None else weight.tensor.grad.clone()
    return found


def gradients(
    rank: int, world_size: int, layouts: list[ParallelConfig], steps: list[Routes], precision: str, keys: dict[str, Any]
) -> list[Shards]:
    """By layout and step, this rank's gradients."""
    found: list[Shards] = []
    for parallel in layouts:
        engine = engine_of(routed(**keys), parallel, world_size, precision)
        for routes in steps:
            everyone = [each for rank, mine in enumerate(routes) for each in batches(mine, rank)]
            tokens = torch.tensor(float(sum(each.valid_tokens for each in everyone)), dtype=torch.float64)
            mine = engine.mesh.data_rank
            engine.accumulate(equal_share(batches(routes[mine], mine), len(routes)), tokens)
            found.append(shards_of(engine))
            engine.zero_grad()
    return found


def compare(world_size: int, layouts: list[ParallelConfig], steps: list[Routes], precision: str = "fp64", **keys: Any) -> None:
    close = {"rtol": 1e-12, "atol": 1e-15} if precision == "fp64" else {"rtol": 0.1, "atol": 0.01}
    expected = len(layouts) * [plain_gradients(routes, **keys) for routes in steps]
    for each in run_ranks(world_size, gradients, layouts, steps, precision, keys, timeout=60.0):
        for whole, shards in zip(expected, each, strict=True):
            for name, (rows, found) in shards.items():
                wanted = whole[name]
                assert (found is None) == (wanted is None), name
                if found is not None and wanted is not None:
                    torch.testing.assert_close(found.to(wanted.dtype), wanted[tuple(rows)], **close, msg=name)


LAYOUTS = [ParallelConfig(zero=0), ParallelConfig(zero=1)]


@pytest.mark.parametrize("case", CASES)
def test_the_gradient_is_the_sum_over_all_ranks(case: str) -> None:
    compare(2, LAYOUTS, CASES[case])


def test_copies_of_shards_may_use_other_weights() -> None:
    """Also where the ranks that share a copy use the same."""
    within = [[routes[rank % 2] for rank in range(4)] for steps in CASES.values() for routes in steps]
    across = [[routes[rank // 2] for rank in range(4)] for steps in CASES.values() for routes in steps]
    compare(4, [ParallelConfig(zero=1, replicate=2)], within + across)


def test_zeros_have_the_dtype_in_which_other_ranks_send() -> None:
    """A single micro-batch's gradients are sent in bf16, and sums of several in fp32."""
    compare(2, LAYOUTS, [[[WHOLE], [NONE]], [[NONE, FIRST], [NONE, NONE]]], precision="bf16")


def test_a_tied_weight_completes_last() -> None:
    compare(2, LAYOUTS, [*CASES["from the first step on"], *CASES["in another order"]], tied=True)


def test_weights_within_reentrant_checkpoints_are_found() -> None:
    """Their graph is made in the backward pass, and two of them have a gradient of the same weight each."""
    steps = [[[WHOLE], [FIRST]], [[WHOLE], [WHOLE]], [[WHOLE, NONE], [LAST, FIRST]], [[TWICE], [OTHER_TWICE]]]
    compare(2, LAYOUTS, steps, reentrant=True)


def test_a_weight_that_a_function_gives_no_gradient_counts_as_used() -> None:
    """PyTorch calls its hook all the same, without a gradient; the other ranks have one."""
    compare(2, LAYOUTS, [[[WHOLE], [LAST]], [[LAST], [WHOLE]], [[LAST, WHOLE], [NONE, FIRST]]], reached=True)


DECODER = {**Work().llama(), "layers": 3}
EXPERTS = {**DECODER, "experts": {"count": 4, "top_k": 2, "ffn_dim": 7}}


@pytest.mark.parametrize(
    ("keys", "parallel", "steps"),
    [
        (DECODER, ParallelConfig(zero=1, tp=2), [[[WHOLE], [FIRST]], [[LAST, FIRST], [SECOND, WHOLE]]]),
        (EXPERTS, ParallelConfig(zero=1, ep=2), [2 * [[WHOLE]] + 2 * [[FIRST]], 2 * [[LAST, FIRST]] + 2 * [[SECOND, WHOLE]]]),
    ],
    ids=["tensor parallel", "experts"],
)
def test_a_decoder_of_ones_own_may_leave_out_layers(
    keys: dict[str, Any], parallel: ParallelConfig, steps: list[Routes]
) -> None:
    """Experts have axes of their own. Ranks that exchange tokens must run the same mixtures."""
    compare(4, [parallel], steps, **keys)


class Own(Decoder):
    """May leave out weights, for all that is known of it."""


def test_ranks_with_other_numbers_of_rows_compare_only_in_their_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under hybrid data parallelism. One that waited in a row that it shares would hold up its peer for ever."""
    monkeypatch.setattr(parity, "decoder", lambda **shape: Own(DecoderConfig.of(shape)))
    work = Work(ParallelConfig(zero=1, hdp="greedy", hdp_tokens=6), micro=2, samples=6, steps=2, documents=True, lr=2e-3)
    dealt = HybridAssigner.of(work.parallel, Layout.plan(work.parallel, 3), 2 * SEQ_LEN, CostModel(10.0, 100.0))
    lengths = BatchDocuments.of(UnevenSamples(work.documents), GlobalBatch(0, work.samples)).lengths
    plan = dealt.plan(lengths, SEQ_LEN, work.micro)
    assert plan.shared and len({len(rows) for rows in plan.rows}) > 1
    (found,) = parity.differences(3, [work], timeout=30.0)
    assert found.worst < 1e-9


def losses(rank: int, world_size: int, parallel: ParallelConfig, steps: int) -> list[float]:
    return take_steps(engine_of(routed(), parallel, world_size), Work(parallel, micro=1, samples=4), range(steps)).losses


def test_losses_of_the_loop_are_those_of_one_process() -> None:
    steps, model = 12, filled()
    names = dict(model.named_parameters())
    groups = [
        {"params": [each for each in names.values() if each.dim() > 1], "weight_decay": 0.1},
        {"params": [each for each in names.values() if each.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    expected: list[float] = []
    without: set[str] = set()
    for number in range(steps):
        everyone = [MicroBatch.collate([sample(index)]) for index in range(4 * number, 4 * number + 4)]
        total = 0.0
        for each in everyone:
            logits, targets = model(each.tokens_BS), each.targets_BS
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")
            loss = loss / sum(one.valid_tokens for one in everyone)
            loss.backward()
            total += loss.item()
        without |= {name for name, weight in names.items() if weight.grad is None and "spare" not in name}
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        expected.append(total)
        optimizer.step()
        optimizer.zero_grad()
    assert without, "in some step no rank uses some weight"
    for parallel in LAYOUTS:
        for found in run_ranks(2, losses, parallel, steps, timeout=60.0):
            assert found == pytest.approx(expected, rel=1e-12)


def refusals(rank: int, world_size: int, parallel: ParallelConfig, steps: list[Routes]) -> list[str]:
    """By step, what is said; empty: nothing."""
    model, found = routed(), list[str]()
    mesh = Mesh.connect(Layout.plan(parallel, world_size), torch.device("cpu"))
    make = functools.partial(AdamW, AdamWConfig(lr=1e-2, weight_decay=0.1, betas=[0.9, 0.95], eps=1e-8))
    engine = make_engine(model, mesh, make, parallel, settings_of(model, parallel, precision="fp32", seed=7))  # type: ignore[arg-type]
    for routes in steps:
        try:
            engine.accumulate(equal_share(batches(routes[rank], rank), world_size), torch.tensor(30.0))
            found.append("")
        except ConfigError as error:
            found.append(str(error))
    return found


@pytest.mark.parametrize("parallel", [ParallelConfig(zero=2), ParallelConfig(zero=3)], ids=["ZeRO-2", "ZeRO-3"])
def test_fsdp_refuses_other_weights_or_another_order(parallel: ParallelConfig) -> None:
    """It would add up gradients of different weights, where these are of one size."""
    same, other, order = [[WHOLE], [WHOLE]], [[FIRST], [SECOND]], [[WHOLE], [BACKWARDS]]
    for found in run_ranks(2, refusals, parallel, [same, same, other]):
        assert found[:2] == ["", ""]
        assert "h.0.norm.weight is used on some ranks only" in found[2]
    for found in run_ranks(2, refusals, parallel, [same, order]):
        assert found[0] == "" and "in another order" in found[1]


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_deepspeed_refuses_other_weights(zero: int) -> None:
    pytest.importorskip("deepspeed", reason="needs the extra: pip install 'meshloom[deepspeed]'")
    steps: list[Routes] = [[[WHOLE], [WHOLE]], [[FIRST], [SECOND]]]
    if zero == 3:  # after a first step it gathers weights ahead, and would meet another gather
        del steps[0]
    for found in run_ranks(2, refusals, ParallelConfig(engine="deepspeed", zero=zero), steps):
        assert not any(found[:-1]) and "h.0.norm.weight is used on some ranks only" in found[-1]


def measured(rank: int, world_size: int, routes: Routes) -> str:
    """Return the error of a step that tells micro-batches' gradients apart."""
    model, parallel = routed(), ParallelConfig(zero=1)
    mesh = Mesh.connect(Layout.plan(parallel, world_size), torch.device("cpu"))
    make = functools.partial(AdamW, AdamWConfig(lr=1e-2, weight_decay=0.1, betas=[0.9, 0.95], eps=1e-8))
    engine = make_engine(model, mesh, make, parallel, settings_of(model, parallel, seed=7, measures=True))  # type: ignore[arg-type]
    tokens = torch.tensor(30.0, dtype=torch.float64)
    engine.accumulate(equal_share(batches(routes[rank], rank), world_size), tokens, Measure.SQUARES)
    with pytest.raises(ConfigError) as caught:
        engine.gradient_norm()
    return str(caught.value)


def test_noise_is_refused_by_the_name_of_a_weight_that_a_micro_batch_leaves_out() -> None:
    """It was an assertion about the engine."""
    for name, said in zip(("h.0", "h.3"), run_ranks(2, measured, [[WHOLE, NONE], [WHOLE, WHOLE]]), strict=True):
        assert f"batch: the gradient's noise can't be measured: {name}.norm.weight is not used in every micro-batch" in said


def events(rank: int, world_size: int, kind: str) -> list[str]:
    """Return the events of a step of ranks that use the same weights, in order."""
    parallel = ParallelConfig(zero=1)
    model = routed() if kind == "own" else decoder(**Work().llama())
    engine = engine_of(model, parallel, world_size)
    seen: list[str] = []
    sent, agreed = torch.distributed.all_to_all_single, torch.distributed.all_reduce

    def send(*tensors: torch.Tensor, **how: Any) -> Any:
        seen.append("send")
        return sent(*tensors, **how)

    def agree(tensor: torch.Tensor, *args: Any, **how: Any) -> Any:
        seen.append("agree")
        return agreed(tensor, *args, **how)

    for parameter in engine.module.parameters():
        parameter.register_hook(lambda _: seen.append("gradient"))
    share = equal_share(batches([WHOLE, WHOLE], 0), world_size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.distributed, "all_to_all_single", send)
        patch.setattr(torch.distributed, "all_reduce", agree)
        engine.weights.begin_step(single=False, fused=False)
        engine.accumulate(share, torch.tensor(100.0))
    return seen


@pytest.mark.parametrize(("kind", "agreements"), [("own", 1), ("ours", 0)])
def test_gradients_still_travel_while_others_are_computed(kind: str, agreements: int) -> None:
    for seen in run_ranks(2, events, kind):
        last = len(seen) - 1 - seen[::-1].index("gradient")
        assert seen[:last].count("send") > 1
        assert seen[:last].count("agree") == agreements


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weight)
        ctx.variable = weight  # as a leaf of the graph has one
        return 2 * x * weight

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return 2 * grads[0] * ctx.saved_tensors[0], grads[0].sum(0)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 1, 0, 2), (1, 0, 1, 3, 2, 0), (2, 2, 1, 3, 1)])
def test_gradients_complete_in_the_order_that_the_graph_tells(order: Sequence[int]) -> None:
    """Guards a private number of PyTorch's nodes, by which autograd runs them."""
    weights = [nn.Parameter(torch.randn(3, 3)) for _ in range(3)] + [nn.Parameter(torch.randn(3))]
    unused, seen = nn.Parameter(torch.randn(3)), []
    for number, weight in enumerate(weights):
        weight.register_post_accumulate_grad_hook(lambda _, number=number: seen.append(number))
    x = torch.randn(2, 3)
    for number in order:
        weight = weights[number]
        x = Doubled.apply(x, weight) if number == 3 else checkpoint(torch.mm, x.tanh(), weight, use_reentrant=False)
    completed, hides = completion((x + weights[order[0]].sum()).sum(), {*weights, unused})
    (x + weights[order[0]].sum()).sum().backward()
    assert not hides and unused not in completed
    assert seen == sorted(set(order), key=lambda number: completed[weights[number]], reverse=True)
