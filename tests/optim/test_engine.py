"""Optimizers in the engine: AGVM's halves of accumulated gradients, and optimizers' state through a checkpoint's parts."""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from meshloom.optim.optimizers.adagrad import AdaGrad, AdaGradNorm
from meshloom.optim.optimizers.adamw import AdamW
from meshloom.optim.optimizers.agvm import AGVM
from meshloom.optim.optimizers.config import (
    AdaGradConfig,
    AdaGradNormConfig,
    AdamWConfig,
    AGVMConfig,
    LAMBConfig,
    LARSConfig,
    OptimConfig,
)
from meshloom.optim.optimizers.layerwise import LAMB, LARS
from meshloom.parallel.config import ParallelConfig
from meshloom.parallel.engine import Engine
from meshloom.parallel.engines import make_engine
from meshloom.parallel.layout import Layout
from meshloom.parallel.mesh import Mesh
from support.configs import problems_of
from support.models import decoder
from support.parity import Work, take_steps
from support.ranks import run_ranks
from support.settings import settings_of
from support.tiny_run import body

CONFIGS: dict[type[torch.optim.Optimizer], type[OptimConfig]] = {
    AdamW: AdamWConfig,
    AGVM: AGVMConfig,
    LAMB: LAMBConfig,
    LARS: LARSConfig,
    AdaGrad: AdaGradConfig,
    AdaGradNorm: AdaGradNormConfig,
}


def build(parallel: ParallelConfig, world_size: int, make: type[torch.optim.Optimizer], **options: Any) -> Engine:
    mesh = Mesh.connect(Layout.plan(parallel, world_size), torch.device("cpu"))
    with torch.device("meta"):
        model = decoder(**Work().llama())
    optimizer = functools.partial(make, CONFIGS[make](lr=0.01, **options))
    return make_engine(model, mesh, optimizer, parallel, settings_of(model, parallel, seed=7))


def train(engine: Engine, first: int, last: int, micro: int = 1) -> list[float]:
    """Train these steps at a constant rate. Returns the losses."""
    return take_steps(engine, Work(samples=8, micro=micro, halves=True), range(first, last)).losses


def scales(
    rank: int, world_size: int, layouts: list[ParallelConfig], micro: int = 1
) -> list[tuple[list[float], dict[str, float]]]:
    """Train four steps under each layout, measuring before all but the first. Returns the losses and AGVM's last scales."""
    found: list[tuple[list[float], dict[str, float]]] = []
    for layout in layouts:
        engine = build(layout, world_size, AGVM, interval=1, smoothing=0.8)
        losses = train(engine, 0, 4, micro)
        found.append((losses, {name: value for name, value in engine.counters().items() if name.startswith("scale.")}))
    return found


def plain(rank: int, world_size: int) -> list[float]:
    """Train the same steps with AdamW."""
    return train(build(ParallelConfig(zero=0), world_size, AdamW), 0, 5)


LAYOUTS = [
    ParallelConfig(zero=0),
    ParallelConfig(zero=1),
    ParallelConfig(zero=2),
    ParallelConfig(zero=3),
    ParallelConfig(zero=3, replicate=2),
]


def test_every_layout_measures_and_trains_alike() -> None:
    """Every layout compares the same halves of the batch: the scales move, and the losses with them, alike to rounding.

    8 micro-batches do not divide by 3 ranks, nor do their halves.
    """
    results = [*run_ranks(1, scales, LAYOUTS[:1]), *run_ranks(3, scales, LAYOUTS[:4]), *run_ranks(4, scales, LAYOUTS)]
    losses, reached = results[0][0]
    adamw = run_ranks(1, plain)[0]
    assert max(abs(scale - 1) for scale in reached.values()) > 0.02
    assert losses[:2] == pytest.approx(adamw[:2], rel=1e-9), "the first update is AdamW's"
    assert losses[3] != pytest.approx(adamw[3], rel=1e-6)
    for of_rank in results:
        for other_losses, other in of_rank:
            assert other_losses == pytest.approx(losses, rel=1e-9)
            assert other == pytest.approx(reached, rel=1e-9)


def test_tensor_parallel_ranks_measure_what_one_rank_does() -> None:
    """A half's gradient is whole, though it is summed over the ranks only when the half is complete."""
    (alone,) = run_ranks(1, scales, LAYOUTS[:1], 2)[0]
    for (cut,) in run_ranks(2, scales, [ParallelConfig(zero=0, tp=2)], 2):
        assert cut[0] == pytest.approx(alone[0], rel=1e-9) and cut[1] == pytest.approx(alone[1], rel=1e-9)


def test_the_same_halves_in_other_micro_batches_agree() -> None:
    """Samples 0 to 3 are the first half of the batch in two micro-batches of 4, and in four of 2."""
    (alone,), (again,) = (run_ranks(1, scales, LAYOUTS[:1], micro)[0] for micro in (4, 2))
    assert alone[0] == pytest.approx(again[0], rel=1e-9) and alone[1] == pytest.approx(again[1], rel=1e-9)


KINDS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "lamb": (LAMB, {}),
    "lars": (LARS, {"trust": 1.0}),
    "adagrad": (AdaGrad, {}),
    "adagrad_norm": (AdaGradNorm, {}),
    "agvm": (AGVM, {"interval": 3}),
}


def carry(before: Engine, after: Engine) -> dict[Any, torch.Tensor]:
    """Restore into a new engine the fragments that it holds. Returns the others."""
    kept = {(fragment.key, fragment.box): fragment.tensor.clone() for fragment in before.fragments()}
    after.prepare_restore()
    with torch.no_grad():
        for fragment in after.fragments():
            fragment.tensor.copy_(kept.pop((fragment.key, fragment.box)))
    return kept


def interrupted(rank: int, world_size: int) -> dict[str, tuple[list[float], list[float]]]:
    """Train five steps at once; and two under ZeRO-3, then three in an engine restored under ZeRO-1."""
    found: dict[str, tuple[list[float], list[float]]] = {}
    for name, (make, options) in KINDS.items():
        whole = train(build(ParallelConfig(zero=3), world_size, make, **options), 0, 5)
        before = build(ParallelConfig(zero=3), world_size, make, **options)
        losses = train(before, 0, 2)
        after = build(ParallelConfig(zero=1), world_size, make, **options)
        assert not carry(before, after), "state that the new engine has no place for"
        after.load_counters(before.counters())
        found[name] = whole, losses + train(after, 2, 5)
    return found


def test_state_goes_through_fragments_and_counters() -> None:
    """AGVM measures before its fourth step, of which it counted two before the interruption."""
    for results in run_ranks(2, interrupted):
        for name, (whole, cut) in results.items():
            assert cut == pytest.approx(whole, rel=1e-9), name
            assert len({round(loss, 6) for loss in whole}) == 5, f"{name} does not train"


def continued(
    rank: int, world_size: int, make: type[torch.optim.Optimizer], options: dict[str, Any]
) -> tuple[list[float], dict[str, float]]:
    """Train two steps with AdamW, and restore its state, as far as it fits, into an engine with another optimizer."""
    before = build(ParallelConfig(zero=3), world_size, AdamW)
    losses = train(before, 0, 2)
    after = build(ParallelConfig(zero=3), world_size, make, **options)
    carry(before, after)
    known = after.counters()
    after.load_counters({name: value for name, value in before.counters().items() if name in known})
    known = after.counters()
    return losses + train(after, 2, 5), known


def test_adamw_goes_on_as_agvm() -> None:
    """AGVM that never measures is AdamW; its scales, of which AdamW knows nothing, begin at 1 and not at 0."""
    losses, counters = run_ranks(1, continued, AGVM, {"interval": 50})[0]
    assert {value for name, value in counters.items() if name.startswith("scale.")} == {1.0}
    assert losses == pytest.approx(run_ranks(1, plain)[0], rel=1e-9)


def test_adagrad_norm_goes_on_from_what_it_begins_with() -> None:
    _, counters = run_ranks(1, continued, AdaGradNorm, {"initial": 0.25})[0]
    assert counters == {"accumulator": 0.25}


def told(rank: int, world_size: int, overrides: list[str]) -> str:
    """Return what a run says about state that it could not restore."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("meshloom").addHandler(handler)
    assert body(rank, world_size, overrides) == 0
    return "\n".join(line for line in said if "begun anew" in line)


def test_a_resumed_run_names_the_counters_that_it_begins_anew(tmp_path: Path) -> None:
    steps = [f"output_dir={tmp_path}", "batch.micro=1"]
    assert run_ranks(1, told, [*steps, "trainer.steps=2"]) == [""]
    (said,) = run_ranks(1, told, [*steps, "trainer.steps=4", "resume=auto", "optim=agvm"])
    assert all(name in said for name in ("scale.attention", "updates")) and "step" not in said
    assert run_ranks(1, told, [*steps, "trainer.steps=6", "resume=auto", "optim=agvm"]) == [""]


def test_a_batch_that_cannot_be_halved_is_refused() -> None:
    words = ["recipe=quickstart", "data=synthetic", "model.vocabulary=64", "optim=agvm", "batch.samples=8"]
    assert list(problems_of(1, *words, "batch.micro=8")) == ["batch.micro"]
    assert "optim" in problems_of(2, *words, "batch.micro=1", "parallel.pp=2")
