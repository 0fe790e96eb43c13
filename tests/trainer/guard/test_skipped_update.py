"""An update that is skipped changes no bit, whatever the optimizer; a retention that suspects; samples that are left out."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from meshloom.checkpoint.files import LocalFiles
from meshloom.checkpoint.saving.commit import steps_to_prune
from meshloom.data.batch import IGNORED, Sample
from meshloom.data.samples.left_out import LeftOut
from meshloom.models.mixture.balance_config import BalanceConfig
from meshloom.optim.build import build_optimizer
from meshloom.optim.optimizers.config import AdamWConfig, AdEMAMixConfig, AGVMConfig, LionConfig, OptimConfig
from meshloom.optim.optimizers.frugal_config import FRUGALConfig
from meshloom.optim.optimizers.matrix_config import MuonConfig, NorMuonConfig, SOAPConfig
from meshloom.parallel.engine import Engine
from meshloom.parallel.engines import make_engine
from meshloom.parallel.layout import Layout
from meshloom.parallel.mesh import Mesh
from support.checkpoint_runs import save_steps
from support.models import decoder
from support.parity import UnevenSamples, Work, share
from support.ranks import run_ranks
from support.settings import settings_of

EXPERTS = {"count": 4, "top_k": 2, "ffn_dim": 12, "scores": "sigmoid", "bias": True}
MIXTURE = Work(samples=4, model=(("experts", EXPERTS),), balance=(("global_batch", 0.01), ("bias_rate", 0.01)))
CASES: dict[str, tuple[Work, OptimConfig, bool]] = {
    "adamw, of experts": (MIXTURE, AdamWConfig(lr=0.01), True),
    "adamw, not fused": (Work(samples=4), AdamWConfig(lr=0.01, fused=False), False),
    "agvm": (Work(samples=4, halves=True), AGVMConfig(lr=0.01, interval=1), False),
    "muon": (Work(samples=4), MuonConfig(lr=0.02), True),
    "normuon": (Work(samples=4), NorMuonConfig(lr=0.02), True),
    "soap": (Work(samples=4), SOAPConfig(lr=0.01, interval=2), False),
    "ademamix": (Work(samples=4), AdEMAMixConfig(lr=0.01), True),
    "frugal": (Work(samples=4), FRUGALConfig(lr=0.01, interval=1), True),
    "lion": (Work(samples=4), LionConfig(lr=0.01), False),
}


def engine_of(work: Work, config: OptimConfig, world_size: int) -> Engine:
    """An engine with an optimizer of this config."""
    mesh = Mesh.connect(Layout.plan(work.parallel, world_size), torch.device("cpu"))
    with torch.device("meta"):
        model = decoder(**work.llama())
    settings = settings_of(model, work.parallel, precision="fp64", seed=7, balance=BalanceConfig(**dict(work.balance)))
    return make_engine(model, mesh, functools.partial(build_optimizer, config), work.parallel, settings)


def state_of(engine: Engine) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    return {each.key: each.tensor.clone() for each in engine.fragments()}, engine.counters()


def steps(rank: int, world_size: int, name: str) -> tuple[bool, bool, bool]:
    """Return whether an update skipped for nan gradients left all as it was; whether a good one did not; `masks_updates`."""
    work, config, _ = CASES[name]
    engine = engine_of(work, config, world_size)

    def step(number: int, skip: float) -> None:
        mine = share(engine.mesh, work, number * work.samples)
        engine.accumulate(mine, torch.tensor(40.0, dtype=torch.float64))
        if skip:
            for parameter in engine.optimizer.param_groups:  # type: ignore[attr-defined]
                for weight in parameter["params"]:
                    weight.grad.fill_(torch.nan)
        engine.update(0.01, torch.tensor(skip))
        if skip:
            engine.forget_updates(1)
        engine.zero_grad()

    step(0, 0.0)
    before, counted = state_of(engine)
    step(1, 1.0)
    skipped, still = state_of(engine)
    step(1, 0.0)
    after, now = state_of(engine)
    untouched = all(torch.equal(before[key], skipped[key]) for key in before) and before.keys() == skipped.keys()
    changed = all(not torch.equal(before[key], after[key]) for key in before if key.startswith(("weight/", "run/")))
    return untouched and counted == still, changed and (now != counted or not now), engine.masks_updates


@pytest.mark.parametrize("name", CASES)
def test_a_skipped_update_changes_no_bit(name: str) -> None:
    assert run_ranks(1, steps, name) == [(True, True, CASES[name][2])]


def twice(rank: int, world_size: int, names: Sequence[str]) -> dict[str, float]:
    """The largest relative difference between two updates that may be skipped, and are not, and two that may not."""
    return {name: difference(*CASES[name][:2], world_size) for name in names}


def difference(work: Work, config: OptimConfig, world_size: int) -> float:
    found: list[dict[str, torch.Tensor]] = []
    for skip in (None, torch.tensor(0.0)):
        engine = engine_of(work, config, world_size)
        for number in range(2):
            engine.accumulate(share(engine.mesh, work, number * work.samples), torch.tensor(40.0, dtype=torch.float64))
            engine.update(0.01, skip)
            engine.zero_grad()
        found.append(state_of(engine)[0])
    return max(float((found[0][key] - found[1][key]).norm() / found[0][key].norm()) for key in found[0])


def test_an_update_that_may_be_skipped_is_the_same() -> None:
    (found,) = run_ranks(1, twice, [name for name, (_, _, masked) in CASES.items() if masked])
    assert max(found.values()) < 1e-12, found


def moved_alike(rank: int, world_size: int) -> bool:
    """Return whether averages move alike with a skip that may be and without one."""
    averages = [torch.linspace(-3, 3, 997).bfloat16() for _ in range(2)]
    other = torch.linspace(5, -7, 997).bfloat16()
    for average, skip in zip(averages, (None, torch.tensor(0.0)), strict=True):
        optimizer = engine_of(Work(samples=4), MuonConfig(lr=0.02), 1).optimizer  # type: ignore[attr-defined]
        optimizer.skip = skip
        optimizer.move([average], [other], 0.05)
    return torch.equal(*averages)


def test_an_average_in_half_precision_moves_by_the_rate_of_a_number() -> None:
    """As a tensor of its precision, 0.05 would be 0.0500488."""
    assert run_ranks(1, moved_alike) == [True]


def test_retention_keeps_the_last_step_before_a_suspicion(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2, 3, 4, 5, keep=0)
    files = LocalFiles(tmp_path)
    assert [int(name[-1]) for name in steps_to_prune(files, 2)] == [3, 2, 1]
    assert [int(name[-1]) for name in steps_to_prune(files, 2, suspected=3)] == [3, 1]
    assert [int(name[-1]) for name in steps_to_prune(files, 2, suspected=5)] == [3, 2, 1]
    assert [int(name[-1]) for name in steps_to_prune(files, 2, suspected=1)] == [3, 2, 1]


def test_a_left_out_sample_has_no_token_and_no_target_left() -> None:
    plain, samples = UnevenSamples(documents=True), LeftOut(UnevenSamples(documents=True), {3, 4}.__contains__)
    for index in (2, 5):
        for one, two in ((samples[index], plain[index]), (samples.part(index, 2, 9), plain[index].part(2, 9))):
            assert equal(one, two)
    blank = samples[3]
    assert not blank.tokens.any() and (blank.targets == IGNORED).all()
    assert np.array_equal(blank.documents, plain[3].documents)  # type: ignore[arg-type]
    part = samples.part(4, 1, 5)
    assert len(part.tokens) == 4 and not part.tokens.any() and (part.targets == IGNORED).all()
    assert np.array_equal(samples.lengths(3), LeftOut(plain, lambda _: False).lengths(3))


def equal(one: Sample, two: Sample) -> bool:
    return np.array_equal(one.tokens, two.tokens) and np.array_equal(one.targets, two.targets)
