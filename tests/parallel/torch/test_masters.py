"""Weights that lie whole beside their masters train as FSDP2's do, and never lag behind them."""

from __future__ import annotations

import functools
import gc
import itertools
import weakref
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.utils._python_dispatch import TorchDispatchMode

from meshloom.data.batch import MicroBatch
from meshloom.models.config import DecoderConfig
from meshloom.models.decoder import Decoder
from meshloom.models.init import Normal
from meshloom.models.part import WeightRule
from meshloom.optim.optimizers.adamw import AdamW
from meshloom.optim.optimizers.config import AdamWConfig
from meshloom.parallel.config import ParallelConfig
from meshloom.parallel.engine import EngineSettings
from meshloom.parallel.engines import make_engine
from meshloom.parallel.layout import Layout
from meshloom.parallel.mesh import Mesh
from meshloom.parallel.torch.engine import TorchEngine
from support.engines import masters_of
from support.parity import Work, build, curves, equal_share, sample, share, step, train
from support.ranks import run_ranks

FSDP = ParallelConfig(zero=2, offload="cpu")  # goes through FSDP2 on any number of ranks, one included


@pytest.mark.parametrize("model", [(), (("tied", True),)], ids=["untied", "tied"])
@pytest.mark.parametrize("micro", [8, 3], ids=["one micro-batch", "three"])
def test_bf16_losses_of_one_rank_are_those_of_fsdp(micro: int, model: tuple[tuple[str, bool], ...]) -> None:
    settings = {"micro": micro, "precision": "bf16", "model": model}
    ((losses, norms),) = run_ranks(1, curves, Work(ParallelConfig(zero=0), **settings))  # type: ignore[arg-type]
    ((expected, expected_norms),) = run_ranks(1, curves, Work(FSDP, **settings))  # type: ignore[arg-type]
    assert losses == pytest.approx(expected, rel=1e-6)
    assert norms == pytest.approx(expected_norms, rel=1e-5)
    assert len(set(losses)) == len(losses), "the weights change"


def curves_of(rank: int, world_size: int, works: list[Work]) -> list[tuple[list[float], list[float]]]:
    return [curves(rank, world_size, work) for work in works]


@pytest.mark.parametrize(("micro", "tolerance"), [(4, 1e-6), (1, 1e-3)], ids=["one micro-batch", "several"])
def test_bf16_losses_of_two_ranks_are_those_of_fsdp(micro: int, tolerance: float) -> None:
    """Two gradients have one sum in fp32, however they are sent; more are added up in another order than ZeRO-2's."""
    layouts = [ParallelConfig(zero=2), ParallelConfig(zero=0), ParallelConfig(zero=1)]
    works = [Work(layout, micro=micro, precision="bf16", model=(("tied", True),)) for layout in layouts]
    (expected, expected_norms), *others = run_ranks(2, curves_of, works)[0]
    for losses, norms in others:
        assert losses == pytest.approx(expected, rel=tolerance)
        assert norms == pytest.approx(expected_norms, rel=10 * tolerance)


def written_to(rank: int, world_size: int) -> tuple[float, float, float, set[str]]:
    engine, *_ = train(Work(ParallelConfig(zero=1), precision="bf16", steps=2), world_size)
    assert isinstance(engine, TorchEngine)
    batch = [MicroBatch.collate([sample(index) for index in range(4)])]
    before = float(engine.evaluate(batch).mean)
    kept = {fragment.name: fragment.tensor.clone() for fragment in engine.fragments() if fragment.role == "weight"}
    dtypes = {str(fragment.tensor.dtype) for fragment in engine.fragments()}
    for fragment in engine.fragments():
        if fragment.role == "weight":
            fragment.tensor.zero_()
    engine.load_counters(engine.counters())  # as every restore does at its end
    without = float(engine.evaluate(batch).mean)
    for fragment in engine.fragments():
        if fragment.role == "weight":
            fragment.tensor.copy_(kept[fragment.name])
    engine.load_counters(engine.counters())
    return before, without, float(engine.evaluate(batch).mean), dtypes


@pytest.mark.parametrize("ranks", [1, 2])
def test_values_that_a_checkpoint_writes_are_computed_with(ranks: int) -> None:
    for before, without, after, dtypes in run_ranks(ranks, written_to):
        assert dtypes == {"torch.float32"}
        assert without == pytest.approx(torch.tensor(61.0).log().item(), rel=1e-6)  # all weights 0: a uniform guess
        assert before == after != without


def summed(rank: int, world_size: int, factors: list[list[float]], fused: bool) -> list[tuple[float, str]]:
    """Every weight's gradient when the micro-batches of each rank bring these, the same for all elements."""
    engine = build(Work(ParallelConfig(zero=1), precision="bf16"), world_size)
    masters, mine = masters_of(engine), factors[rank]
    masters.begin_step(single=len(mine) == 1, fused=fused)
    for number, factor in enumerate(mine):
        masters.set_last_micro_batch(number == len(mine) - 1)
        torch.stack([(parameter * factor).sum() for parameter in engine.module.parameters()]).sum().backward()
    masters.wait_reduce()
    gradients = [weight.tensor.grad for weight in masters.local.values() if weight.tensor.numel()]
    assert all(parameter.grad is None for parameter in engine.module.parameters())
    assert all(gradient is not None for gradient in gradients)
    return [
        (float(value), str(gradient.dtype)) for gradient in gradients if gradient is not None for value in gradient.unique()
    ]


def test_several_passes_sum_in_fp32_and_one_keeps_its_dtype() -> None:
    # bf16 has no number between 256 and 258: there 256 + 1 + 1 would stay at 256.
    (one,) = run_ranks(1, summed, [[256.0, 1.0, 1.0]], True)
    assert set(one) == {(258.0, "torch.float32")}
    (one,) = run_ranks(1, summed, [[1.0]], True)
    assert set(one) == {(1.0, "torch.bfloat16")}
    (one,) = run_ranks(1, summed, [[1.0]], False)
    assert set(one) == {(1.0, "torch.float32")}
    for rank in run_ranks(2, summed, [[256.0], [1.0]], True):
        assert set(rank) == {(257.0, "torch.float32")}
    for rank in run_ranks(2, summed, [[256.0, 1.0], [256.0, 2.0]], True):
        assert set(rank) == {(515.0, "torch.float32")}


class Spare(Decoder):
    """Each block has a weight that no forward pass uses."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        for block in self.layers.values():
            block.spare = torch.nn.Linear(6, 6, bias=False)
            block.weight_rules = {**block.weight_rules, "spare": WeightRule(Normal(0.02))}


def with_a_spare_weight(rank: int, world_size: int, layouts: list[ParallelConfig]) -> list[tuple[list[float], dict[str, bool]]]:
    """By layout: losses and norms of three steps, and which weights they moved."""
    found: list[tuple[list[float], dict[str, bool]]] = []
    for parallel in layouts:
        work = Work(parallel, micro=2, steps=3)
        mesh = Mesh.connect(Layout.plan(parallel, world_size), torch.device("cpu"))
        with torch.device("meta"):
            model = Spare(DecoderConfig(**work.llama()))
        make = functools.partial(AdamW, AdamWConfig(lr=1e-2, weight_decay=0.1))
        engine = make_engine(model, mesh, make, parallel, EngineSettings(seed=7, precision="fp64"))
        before = {f.name: f.tensor.clone() for f in engine.fragments() if f.role == "weight"}
        curve = [number for at in range(work.steps) for number in step(engine, work, at)]
        after = {f.name: f.tensor for f in engine.fragments() if f.role == "weight"}
        found.append((curve, {name: not torch.equal(before[name], after[name]) for name in before}))
    return found


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_unused_weight_keeps_nobody_from_training(ranks: int) -> None:
    layouts = [FSDP, ParallelConfig(zero=0), ParallelConfig(zero=1)]
    (expected, _), *others = run_ranks(ranks, with_a_spare_weight, layouts)[0]
    for curve, moved in others:
        assert curve == pytest.approx(expected, rel=1e-9)
        assert {name for name, did in moved.items() if not did} == {name for name in moved if "spare" in name}


def moments(rank: int, world_size: int, parallel: ParallelConfig) -> tuple[float, float]:
    from meshloom.parallel.gradient_noise import Measure

    engine = build(Work(parallel, precision="bf16"), world_size, measures=True)
    batches = [MicroBatch.collate([sample(index) for index in (first, first + 1)]) for first in (0, 2)]
    engine.accumulate(equal_share(batches), torch.tensor(float(sum(b.valid_tokens for b in batches))), Measure.PROJECTIONS)
    engine.gradient_norm()
    found = engine.gradient_moments(4)
    assert found is not None
    statistics = found.read()
    assert statistics.projection_square is not None
    return statistics.worker_square, statistics.projection_square


def test_gradient_moments_are_those_of_fsdp() -> None:
    (plain,) = run_ranks(1, moments, ParallelConfig(zero=0))
    (fsdp,) = run_ranks(1, moments, FSDP)
    assert plain == pytest.approx(fsdp, rel=1e-5)


def restored_again_and_again(rank: int, world_size: int, precision: str) -> int:
    """Count how often whole weights were not what had just been restored, while old ones were being gathered."""
    engine = build(Work(ParallelConfig(zero=1), precision=precision), world_size)
    masters = masters_of(engine)
    gate, stale = engine.mesh.store("gate"), 0
    units = masters.units

    def open_gate(number: int) -> None:
        if rank == 0:
            gate.set(str(number), "")

    def waiting(number: int, unit: Any, **how: Any) -> None:
        if unit.gathering:
            open_gate(number)
        plain(unit, **how)

    plain = type(units[0]).wait_all_gather
    for number in range(1, 4):
        if rank:  # its part of the gathering comes when the other rank has written its weights, or waits before it does
            gate.wait([str(number)])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(units[0]), "wait_all_gather", lambda unit, number=number, **how: waiting(number, unit, **how))
            engine.prepare_restore()
            for fragment in engine.fragments():
                if fragment.role == "weight":
                    fragment.tensor.fill_(float(number))
            open_gate(number)
            engine.load_counters(engine.counters())
            masters.sync_from_masters()
        for unit in units:
            unit.wait_all_gather()
        stale += any(bool((parameter != number).any()) for parameter in engine.module.parameters())
    return stale


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_restored_weights_are_not_overtaken_by_a_gather_under_way(precision: str) -> None:
    assert run_ranks(2, restored_again_and_again, precision) == [0, 0]


def travelled(rank: int, world_size: int, micro_batches: int) -> list[str]:
    """Return what happened in a step under ZeRO-1, in order: gradients that were ready, pieces sent, pieces waited for."""
    engine = build(Work(ParallelConfig(zero=1), precision="bf16"), world_size)
    assert isinstance(engine, TorchEngine)
    events: list[str] = []

    class Watched:
        def __init__(self, work: Any) -> None:
            self.work = work

        def wait(self) -> None:
            events.append("wait")
            self.work.wait()

    def exchange(received: torch.Tensor, sent: torch.Tensor, **how: Any) -> Watched:
        events.append(f"send {sent.dtype}")
        return Watched(plain(received, sent, **how))

    plain = torch.distributed.all_to_all_single
    for parameter in engine.module.parameters():
        parameter.register_hook(lambda _: events.append("gradient"))
    batches = [MicroBatch.collate([sample(4 * rank + index)]) for index in range(micro_batches)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.distributed, "all_to_all_single", exchange)
        engine.accumulate(equal_share(batches, world_size), torch.tensor(100.0))
    return events


@pytest.mark.parametrize(("micro_batches", "dtype"), [(1, "torch.bfloat16"), (2, "torch.float32")])
def test_gradients_travel_once_and_while_the_next_are_computed(micro_batches: int, dtype: str) -> None:
    for events in run_ranks(2, travelled, micro_batches):
        groups = 4  # the head and norm, two blocks, the embedding
        assert [event for event in events if event.startswith("send")] == [f"send {dtype}"] * groups
        sends = [at for at, event in enumerate(events) if event.startswith("send")]
        waits = [at for at, event in enumerate(events) if event == "wait"]
        assert len(waits) == groups
        for sent, waited in list(zip(sends, waits, strict=True))[:-1]:
            assert "gradient" in events[sent:waited], "the exchange was waited for before the next gradients were computed"


def reduced_over_tp(rank: int, world_size: int, counts: list[int]) -> list[tuple[int, int]]:
    """By number of micro-batches: all-reduces of tensors of a norm's size in a step, and how many norms there are."""
    found: list[tuple[int, int]] = []
    for count in counts:
        work = Work(ParallelConfig(zero=0, tp=2), micro=2, samples=2 * count)
        engine = build(work, world_size)
        batches = share(engine.mesh, work, 0)
        with Sizes() as sizes:
            engine.accumulate(batches, torch.tensor(100.0))
        found.append(
            (sizes.reduced.count(work.llama()["dim"]), sum("norm" in name for name, _ in engine.module.named_parameters()))
        )
    return found


class Sizes(TorchDispatchMode):
    """Return the number of elements of each all-reduce."""

    def __init__(self) -> None:
        super().__init__()
        self.reduced: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "all_reduce" in str(func):
            self.reduced.append(args[0].numel())
        return func(*args, **(kwargs or {}))


def test_norm_is_reduced_over_tensor_ranks_once_a_step() -> None:
    for once, thrice in run_ranks(2, reduced_over_tp, [1, 3]):
        assert once == thrice
        reductions, norms = once
        assert reductions == norms == 5


def parts_of_a_sum(rank: int, world_size: int, precision: str) -> list[tuple[float, str]]:
    """A norm's gradient of micro-batches in three placements, the parts 1 and 2 on the ranks, or 5 on both."""
    engine = build(Work(ParallelConfig(zero=0, tp=2), precision=precision), world_size)
    masters = masters_of(engine)
    weight = dict(engine.module.named_parameters())["norm.weight"]
    assert isinstance(weight, DTensor)
    found: list[tuple[float, str]] = []
    for order in ("PP", "PRP", "RP", "RR"):
        masters.begin_step(single=len(order) == 1, fused=False)
        for number, kind in enumerate(order):
            masters.set_last_micro_batch(number == len(order) - 1)
            value = torch.full((weight.numel(),), 1.0 + rank if kind == "P" else 5.0, dtype=weight.dtype)
            placement = Partial() if kind == "P" else Replicate()
            given = DTensor.from_local(value, weight.device_mesh, [placement], run_check=False)
            weight.backward(given)
        masters.wait_reduce()
        gradient = masters.local["norm.weight"].tensor.grad
        assert gradient is not None
        found += [(float(value), str(gradient.dtype)) for value in gradient.unique()]
        engine.zero_grad()
    return found


def test_gradient_placement_may_differ_between_micro_batches() -> None:
    for found in run_ranks(2, parts_of_a_sum, "bf16"):
        assert found == [(value, "torch.float32") for value in (6.0, 11.0, 8.0, 10.0)]


def left_behind(rank: int, world_size: int, layouts: list[ParallelConfig]) -> list[int]:
    """By layout, with gradient statistics and without: parameters that are still there when their engine is not."""
    left: list[int] = []
    for parallel, measures in itertools.product(layouts, (False, True)):
        engine = build(Work(parallel, micro=4), world_size, measures)
        step(engine, Work(parallel, micro=4), 0)
        watched = [weakref.ref(parameter) for parameter in engine.module.parameters()]
        del engine
        gc.collect()
        left.append(sum(each() is not None for each in watched))
    return left


def test_weights_of_an_unreferenced_engine_are_released() -> None:
    """A hook that knows its parameter keeps it for ever: autograd's references are none that Python's collector sees."""
    layouts = [ParallelConfig(zero=0), ParallelConfig(zero=1), ParallelConfig(zero=0, tp=2), ParallelConfig(zero=3)]
    for left in run_ranks(2, left_behind, layouts):
        assert left == [0] * 8
