"""Optimizers against worked numbers, against torch's own, and sharded against whole (rule R4) in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist

from meshloom.config.problems import ConfigError
from meshloom.optim.optimizers.adagrad import AdaGrad, AdaGradNorm
from meshloom.optim.optimizers.adamw import AdamW
from meshloom.optim.optimizers.agvm import AGVM
from meshloom.optim.optimizers.config import AdaGradConfig, AdaGradNormConfig, AdamWConfig, AGVMConfig, LAMBConfig, LARSConfig
from meshloom.optim.optimizers.layerwise import LAMB, LARS
from meshloom.optim.optimizers.parameters import NamedParameter, Unsharded, decay_groups
from support.ranks import run_ranks

SHAPES = {
    "embed.weight": (7, 4),
    "layers.0.attention.wq.weight": (4, 4),
    "layers.0.attention_norm.weight": (4,),
    "layers.0.ffn.w1.weight": (10, 4),
    "norm.weight": (4,),
    "head.weight": (7, 4),
}


def whole(seed: int) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=random, dtype=torch.float64) for shape in SHAPES.values()]


def named(tensors: Sequence[torch.Tensor], names: Sequence[str] | None = None) -> list[NamedParameter]:
    return [
        NamedParameter(
            name,
            torch.nn.Parameter(tensor.clone()),
            SHAPES[name],
            decay="norm" not in name and "embed" not in name,
            lr_scale=0.5 if name.startswith("layers") and "norm" not in name else 1.0,
        )
        for name, tensor in zip(names or SHAPES, tensors, strict=True)
    ]


def one(weight: Sequence[float], gradient: Sequence[float]) -> list[NamedParameter]:
    """Make a 1 × n matrix with its gradient."""
    tensor = torch.nn.Parameter(torch.tensor([weight], dtype=torch.float64))
    tensor.grad = torch.tensor([gradient], dtype=torch.float64)
    return [NamedParameter("layers.0.ffn.w1.weight", tensor, tuple(tensor.shape))]


# Oracles.


@pytest.mark.parametrize(("corrected", "after"), [(True, (2.634237, 4.340907)), (False, (2.642576, 4.349640))])
def test_lamb_first_step(corrected: bool, after: tuple[float, float]) -> None:
    """ALGORITHMS 5.1, worked by hand."""
    parameters = one([3, 4], [0.1, -0.2])
    LAMB(LAMBConfig(lr=0.1, weight_decay=0.01, bias_correction=corrected), parameters, Unsharded()).step()
    assert parameters[0].tensor.tolist()[0] == pytest.approx(after, abs=1e-6)


def test_lamb_bounds_the_norm_and_gives_zero_weights_ratio_one() -> None:
    bounded, free, zero = one([3, 4], [0.1, -0.2]), one([3, 4], [0.1, -0.2]), one([0, 0], [0.1, -0.2])
    LAMB(LAMBConfig(lr=0.1, norm_max=1.0), bounded, Unsharded()).step()
    LAMB(LAMBConfig(lr=0.1), free, Unsharded()).step()
    LAMB(LAMBConfig(lr=0.1), zero, Unsharded()).step()
    start = torch.tensor([3.0, 4.0], dtype=torch.float64)
    torch.testing.assert_close((free[0].tensor - start) / 5, bounded[0].tensor - start)
    assert zero[0].tensor.tolist()[0] == pytest.approx([-0.1, 0.1], abs=1e-5)


def test_lars_first_step() -> None:
    """ALGORITHMS 5.1: local rate 0.0182744 at trust 0.001 and weight decay 0.01."""
    parameters = one([3, 4], [0.1, -0.2])
    LARS(LARSConfig(lr=0.1, weight_decay=0.01, trust=0.001), parameters, Unsharded()).step()
    expected = [w - 0.1 * 0.0182744 * (g + 0.01 * w) for w, g in ((3, 0.1), (4, -0.2))]
    assert parameters[0].tensor.tolist()[0] == pytest.approx(expected, abs=1e-8)


def test_lars_without_matrices_is_momentum_sgd() -> None:
    mine, theirs = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    lars = LARS(LARSConfig(lr=0.1), [NamedParameter("norm.weight", mine, (3,), decay=False)], Unsharded())
    sgd = torch.optim.SGD([theirs], lr=0.1, momentum=0.9)
    for step in range(3):
        mine.grad = torch.tensor([1.0, -2.0, 0.5 * step])
        theirs.grad = mine.grad.clone()
        lars.step()
        sgd.step()
    torch.testing.assert_close(mine, theirs)


def test_adagrad_norm_against_its_closed_form() -> None:
    """B² = 0.01 + Σ‖g‖²: with ‖g‖ = 5 twice, steps of lr · g / √25.01 and lr · g / √50.01."""
    parameters = one([0, 0], [3, 4])
    optimizer = AdaGradNorm(AdaGradNormConfig(lr=2.0, initial=0.01), parameters, Unsharded())
    optimizer.step()
    optimizer.step()
    length = 2 / math.sqrt(25.01) + 2 / math.sqrt(50.01)
    assert parameters[0].tensor.tolist()[0] == pytest.approx([-3 * length, -4 * length])


def test_adagrad_and_adamw_are_torchs() -> None:
    for ours, theirs in (
        (
            lambda p: AdamW(AdamWConfig(lr=0.1, fused=False), p, Unsharded()),
            lambda p: torch.optim.AdamW(p, lr=0.1, betas=(0.9, 0.95)),
        ),
        (
            lambda p: AdaGrad(AdaGradConfig(lr=0.1), p, Unsharded()),
            lambda p: torch.optim.Adagrad(p, 0.1, initial_accumulator_value=0.01),
        ),
    ):
        parameters, copies = named(whole(0)), named(whole(0))
        mine = ours(parameters)
        groups = decay_groups(copies, 0.1 if isinstance(mine, AdamW) else 0.0)
        other = theirs([{key: group[key] for key in ("params", "weight_decay")} for group in groups])
        for seed in (1, 2):
            for parameter, copy, gradient in zip(parameters, copies, whole(seed), strict=True):
                parameter.tensor.grad, copy.tensor.grad = gradient, gradient.clone()
            mine.step()
            other.step()
        for parameter, copy in zip(parameters, copies, strict=True):
            torch.testing.assert_close(parameter.tensor, copy.tensor, rtol=1e-12, atol=0)


# AGVM.


def agvm(**settings: Any) -> tuple[list[NamedParameter], AGVM]:
    parameters = named(whole(0))
    optimizer = AGVM(AGVMConfig(**settings), parameters, Unsharded())
    give(optimizer, parameters, whole(1))
    return parameters, optimizer


def give(optimizer: torch.optim.Optimizer, parameters: Sequence[NamedParameter], gradients: Sequence[torch.Tensor]) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.tensor.grad = gradient.clone()
    for group in optimizer.param_groups:
        group["lr"] = 0.01 * group["lr_scale"]
    optimizer.step()


def test_agvm_with_equal_halves_is_adamw() -> None:
    parameters, optimizer = agvm()
    optimizer.observe_halves([g / 2 for g in (p.tensor.grad for p in parameters) if g is not None])
    assert optimizer.scales == pytest.approx(dict.fromkeys(optimizer.scales, 1.0))
    give(optimizer, parameters, whole(2))
    copies = named(whole(0))
    adamw = AdamW(AdamWConfig(), copies, Unsharded())
    for seed in (1, 2):
        give(adamw, copies, whole(seed))
    for parameter, copy in zip(parameters, copies, strict=True):
        torch.testing.assert_close(parameter.tensor, copy.tensor, rtol=1e-12, atol=0)


def test_agvm_slows_down_what_disagrees_more_than_the_anchor() -> None:
    """With eps ≫ √v the preconditioner is a constant and D is 1 − cos of the halves themselves."""
    parameters, optimizer = agvm(eps=1e6, smoothing=0.9)
    halves: list[torch.Tensor] = []
    for parameter in parameters:
        a, b = torch.zeros_like(parameter.tensor), torch.zeros_like(parameter.tensor)
        # the angle between halves: 90° for the ffn, 60° for attention, 0 for the embedding, 180° for the head
        angle = {"ffn": 90, "attention.": 60, "head": 180}
        degrees = next((d for key, d in angle.items() if key in parameter.name), 0)
        a.view(-1)[0] = 1.0
        b.view(-1)[:2] = torch.tensor([math.cos(math.radians(degrees)), math.sin(math.radians(degrees))])
        parameter.tensor.grad = a + b
        halves.append(a)
    optimizer.observe_halves(halves)
    one_step = lambda ratio: 0.9 + 0.1 * math.sqrt(ratio)  # noqa: E731
    assert optimizer.scales == pytest.approx(
        {
            "attention": 1.0,
            "ffn": one_step(0.5),
            "head": one_step(0.5),  # (1 − ½) / 2, clamped from below to ½
            "embedding": one_step(10),  # clamped from above
            "other": one_step(10),
            "experts": 1.0,  # no parameters
        },
        rel=1e-5,
    )


def test_agvm_keeps_scales_as_counters_and_rates_unchanged() -> None:
    parameters, optimizer = agvm()
    optimizer.observe_halves([torch.randn_like(p.tensor) for p in parameters])
    scales = optimizer.scales
    assert scales["ffn"] != 1.0
    give(optimizer, parameters, whole(2))
    assert {group["lr"] for group in optimizer.param_groups} == {0.01, 0.005}
    for parameter in parameters:
        state = optimizer.state[parameter.tensor]
        assert {k: float(v) for k, v in state.items() if k.startswith("scale.")} == {f"scale.{k}": v for k, v in scales.items()}
    assert float(optimizer.state[parameters[-1].tensor]["updates"]) == 2
    assert "'backbone' is none of the modules" in str(AGVMConfig(anchor="backbone").problems()[0])


def test_agvm_refuses_halves_that_leave_out_a_weight() -> None:
    """A model of a user's own may use some of its weights only."""
    parameters, optimizer = agvm()
    halves = [torch.randn_like(p.tensor) for p in parameters]
    with pytest.raises(ConfigError, match=r"optim: agvm compares .* in the first half some weights have none"):
        optimizer.observe_halves(halves[1:])
    parameters[1].tensor.grad = None
    with pytest.raises(ConfigError, match=rf"optim: agvm compares .* {parameters[1].name} has none"):
        optimizer.observe_halves(halves[1:])


def test_agvm_measures_every_tenth_step_from_its_beginning_on() -> None:
    for begin, expected in ((0, [10, 20]), (15, [20])):
        parameters = named(whole(0))
        optimizer = AGVM(AGVMConfig(begin=begin), parameters, Unsharded())
        wanted: list[int] = []
        for step in range(25):
            if optimizer.wants_halves:
                wanted.append(step)
            give(optimizer, parameters, whole(1))
        assert wanted == expected


# Sharded equals whole.


class Rows:
    """Shards by rows over the ranks of a stage; vectors of norms are whole on each, so their copies count once."""

    def __init__(self, rank: int, per_stage: int, stages: int) -> None:
        self.index, self.size = rank % per_stage, per_stage
        groups = [dist.new_group(list(range(s * per_stage, (s + 1) * per_stage))) for s in range(stages)]
        across = [dist.new_group(list(range(i, per_stage * stages, per_stage))) for i in range(per_stage)]
        self.stage, self.peers = groups[rank // per_stage], across[self.index]
        self.collectives = 0

    def cut(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        if len(SHAPES[name]) < 2:
            return tensor
        rows = -(-len(tensor) // self.size)  # as FSDP2 does: the last ranks may hold fewer rows, or none
        return tensor[self.index * rows : (self.index + 1) * rows]

    def sum(self, values: torch.Tensor, parameters: Sequence[NamedParameter]) -> torch.Tensor:
        self.collectives += 1
        copies = torch.tensor([1 if len(p.global_shape) >= 2 else self.size for p in parameters])
        values = values / copies.view(-1, *(1 for _ in values.shape[1:]))
        dist.all_reduce(values, group=self.stage)
        return values

    def across_stages(self, values: torch.Tensor) -> torch.Tensor:
        self.collectives += 1
        values = values.clone()
        dist.all_reduce(values, group=self.peers)
        return values

    def gather(self, parameter: NamedParameter, local: torch.Tensor) -> torch.Tensor:
        raise AssertionError("none of these needs a whole parameter")

    def scatter(self, parameter: NamedParameter, whole: torch.Tensor) -> torch.Tensor:
        return self.cut(parameter.name, whole)


FACTORIES: dict[str, tuple[Callable[..., torch.optim.Optimizer], int]] = {  # with collectives a step, pipeline or not
    "adamw": (partial(AdamW, AdamWConfig()), 0),
    "adagrad": (partial(AdaGrad, AdaGradConfig()), 0),
    "adagrad_norm": (partial(AdaGradNorm, AdaGradNormConfig()), 2),
    "lamb": (partial(LAMB, LAMBConfig()), 1),
    "lars": (partial(LARS, LARSConfig()), 1),
    "agvm": (partial(AGVM, AGVMConfig()), 2),
}


def train(optimizer: torch.optim.Optimizer, parameters: list[NamedParameter], cut: Callable[[str, Any], Any]) -> None:
    index = {name: i for i, name in enumerate(SHAPES)}
    for step in range(3):
        gradients = whole(100 + step)
        for parameter in parameters:
            parameter.tensor.grad = cut(parameter.name, gradients[index[parameter.name]]).clone()
        if isinstance(optimizer, AGVM) and step:
            halves = whole(200 + step)
            optimizer.observe_halves([cut(p.name, halves[index[p.name]]) for p in parameters])
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * group["lr_scale"]
        optimizer.step()


def sharded(rank: int, world: int, stages: int) -> dict[str, tuple[dict[str, torch.Tensor], int]]:
    """Train every optimizer on this rank's shards. Returns the weights, and the number of collectives."""
    shards = Rows(rank, world // stages, stages)
    names = list(SHAPES)
    mine = names if stages == 1 else (names[:4] if rank < world // 2 else names[4:])
    start = dict(zip(names, whole(0), strict=True))
    found: dict[str, tuple[dict[str, torch.Tensor], int]] = {}
    for kind, (factory, _) in FACTORIES.items():
        parameters = named([shards.cut(name, start[name]) for name in mine], mine)
        before = shards.collectives
        train(factory(parameters, shards), parameters, shards.cut)
        found[kind] = {p.name: p.tensor.detach() for p in parameters}, shards.collectives - before
    return found


@pytest.mark.parametrize(("world", "stages"), [(2, 1), (4, 1), (4, 2)])
def test_sharded_equals_whole(world: int, stages: int) -> None:
    """Rows over 2 or 4 ranks (unevenly, and with empty shards), and two pipeline stages that hold different layers."""
    results = run_ranks(world, sharded, stages)
    for kind, (factory, collectives) in FACTORIES.items():
        parameters = named(whole(0))
        train(factory(parameters, Unsharded()), parameters, lambda name, tensor: tensor)
        for parameter in parameters:
            pieces = [result[kind][0][parameter.name] for result in results if parameter.name in result[kind][0]]
            joined = torch.cat(pieces) if parameter.tensor.dim() > 1 else pieces[0]
            assert torch.allclose(joined, parameter.tensor.detach(), rtol=1e-11, atol=1e-14), f"{kind}: {parameter.name}"
            if parameter.tensor.dim() == 1:
                assert all(torch.equal(piece, pieces[0]) for piece in pieces)
        measured = 2 if kind == "agvm" else 3
        assert {result[kind][1] for result in results} == {collectives * measured}
