"""Every optimizer of the recipes under DeepSpeed: it trains as under the torch engine in every stage, or is refused."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from meshloom.optim.build import build_optimizer
from meshloom.optim.optimizers.adagrad import AdaGrad, AdaGradNorm
from meshloom.optim.optimizers.adamw import AdamW
from meshloom.optim.optimizers.config import (
    AdaGradConfig,
    AdaGradNormConfig,
    AdamWConfig,
    AdEMAMixConfig,
    LAMBConfig,
    LARSConfig,
    LionConfig,
    ScheduleFreeConfig,
)
from meshloom.optim.optimizers.eight_bit_config import AdamW8bitConfig
from meshloom.optim.optimizers.frugal_config import FRUGALConfig
from meshloom.optim.optimizers.layerwise import LAMB, LARS
from meshloom.optim.optimizers.lion import Lion
from meshloom.optim.optimizers.matrix_config import MuonConfig, SOAPConfig
from meshloom.optim.optimizers.parameters import NamedParameter, Shards
from meshloom.parallel.config import ParallelConfig
from meshloom.parallel.deepspeed.optimizer import optimizer_problems
from meshloom.parallel.engine import EngineSettings
from meshloom.parallel.engines import make_engine
from meshloom.parallel.layout import Layout
from meshloom.parallel.mesh import Mesh
from support.models import decoder
from support.parity import Work, step
from support.ranks import run_ranks

TOLERANCE = 5e-6
ELEMENTWISE: dict[str, Any] = {"adamw": (AdamW, AdamWConfig, 1e-2), "adagrad": (AdaGrad, AdaGradConfig, 5e-2)}
WORK = Work(steps=4, micro=2, model=(("mup_base", 8),))  # several groups: with and without decay, and of different rates


def trained(rank: int, world_size: int, work: Work, name: str) -> tuple[list[float], list[float], float]:
    """Losses and norms of steps before and after the state was made for a restore and written back; and the first sum."""
    make, config, lr = ELEMENTWISE[name]
    mesh = Mesh.connect(Layout.plan(work.parallel, world_size), torch.device("cpu"))
    with torch.device("meta"):
        model = decoder(**work.llama())
    settings = EngineSettings(seed=7, precision=work.precision)

    def optimizer(parameters: list[NamedParameter], shards: Shards) -> torch.optim.Optimizer:
        return make(config(lr=lr, weight_decay=0.1), parameters, shards)

    engine = make_engine(model, mesh, optimizer, work.parallel, settings)
    work, curve = replace(work, lr=lr), []
    for number in range(work.steps):
        if number == 2:
            state = [(fragment.key, fragment.tensor.clone()) for fragment in engine.fragments()]
            counters = engine.counters()
            engine.prepare_restore()
            for (key, tensor), fragment in zip(state, engine.fragments(), strict=True):
                assert fragment.key == key
                fragment.tensor.copy_(tensor)
            engine.load_counters(counters)
        curve.append(step(engine, work, number))
    return [loss for loss, _ in curve], [norm for _, norm in curve], engine.counters()["step"]


@pytest.mark.parametrize("name", ELEMENTWISE)
@pytest.mark.parametrize(
    ("zero", "offload", "precision"),
    [
        *((zero, "none", "fp32") for zero in range(4)),
        (1, "none", "bf16"),
        (2, "cpu", "fp32"),
        (3, "cpu", "fp32"),
    ],
)
def test_elementwise_optimizers_train_in_every_stage(name: str, zero: int, offload: str, precision: str) -> None:
    """fp32 against the torch engine in fp64. BF16_Optimizer is a class of its own: against the torch engine in bf16."""
    pytest.importorskip("deepspeed", reason="needs the extra: pip install 'meshloom[deepspeed]'")
    exact = replace(WORK, parallel=ParallelConfig(zero=1), precision="bf16" if precision == "bf16" else "fp64")
    losses, norms, steps = run_ranks(2 if precision == "bf16" else 1, trained, exact, name)[0]
    here = ParallelConfig(engine="deepspeed", zero=zero, offload=offload)
    for rank_losses, rank_norms, rank_steps in run_ranks(2, trained, replace(WORK, parallel=here, precision=precision), name):
        assert rank_losses == pytest.approx(losses, rel=TOLERANCE)
        assert rank_norms == pytest.approx(norms, rel=TOLERANCE)
        assert rank_steps == steps == WORK.steps


class Torchs(torch.optim.Adagrad):
    """An AdaGrad that a user might write."""

    def __init__(self, parameters: Sequence[NamedParameter], shards: Shards) -> None:
        super().__init__([{"params": [parameter.tensor], "lr_scale": 1.0} for parameter in parameters], lr=0.1)


def test_others_are_refused_before_anything_starts() -> None:
    for make, config in (*((make, config) for make, config, _ in ELEMENTWISE.values()), (Lion, LionConfig)):
        assert not optimizer_problems(functools.partial(make, config()))
    assert not optimizer_problems(functools.partial(build_optimizer, AdEMAMixConfig()))
    for make, config in ((LAMB, LAMBConfig), (LARS, LARSConfig), (AdaGradNorm, AdaGradNormConfig)):
        (problem,) = optimizer_problems(functools.partial(make, config()))
        assert problem.key == "optim" and "parallel.engine=torch" in problem.fix, make
    for whole in (MuonConfig(), SOAPConfig(), AdamW8bitConfig(), FRUGALConfig(), ScheduleFreeConfig()):
        (problem,) = optimizer_problems(functools.partial(build_optimizer, whole))
        assert problem.key == "optim" and "parallel.engine=torch" in problem.fix, whole.name
    (problem,) = optimizer_problems(Torchs)
    assert "in the place of Torchs" in problem.message and "optim=adagrad" in problem.fix


class Eager(torch.optim.SGD):
    """Has its state from the beginning."""

    def __init__(self, parameters: Sequence[NamedParameter], shards: Shards) -> None:
        tensors = [parameter.tensor for parameter in parameters]
        super().__init__([{"params": tensors, "lr_scale": 1.0}], lr=0.1, momentum=0.9)
        for tensor in tensors:
            self.state[tensor]["momentum_buffer"] = torch.full_like(tensor, 0.5)


def state_at_first(rank: int, world_size: int, work: Work) -> dict[str, set[float]]:
    mesh = Mesh.connect(Layout.plan(work.parallel, world_size), torch.device("cpu"))
    with torch.device("meta"):
        model = decoder(**work.llama())
    optimizer = lambda parameters, shards: Eager(parameters, shards)  # noqa: E731
    engine = make_engine(model, mesh, optimizer, work.parallel, EngineSettings(seed=7, precision="fp32"))
    return {fragment.key: set(fragment.tensor.unique().tolist()) for fragment in engine.fragments()}


def test_initial_weights_go_into_weights_alone() -> None:
    pytest.importorskip("deepspeed", reason="needs the extra: pip install 'meshloom[deepspeed]'")
    found = run_ranks(1, state_at_first, Work(ParallelConfig(engine="deepspeed", zero=0)))[0]
    buffers = {key: values for key, values in found.items() if key.startswith("momentum_buffer/")}
    assert buffers and all(values == {0.5} for values in buffers.values())
    assert len(found["weight/embed.weight"]) > 100
