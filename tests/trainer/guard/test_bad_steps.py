"""Bad steps in runs of several layouts: who is named, and losses as of a run without the step or the samples."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from meshloom.data.batch import IGNORED, MicroBatch, Sample
from meshloom.models.init import fill
from meshloom.optim.batch.controller import Fixed
from meshloom.parallel.config import ParallelConfig
from meshloom.parallel.hybrid.share import HybridAssigner
from meshloom.trainer.guard import spikes
from meshloom.trainer.guard.guard import TrainingDiverged
from meshloom.trainer.guard.journal import read_journal
from meshloom.trainer.hooks.base import Hook
from meshloom.trainer.loop import Loop
from meshloom.trainer.watch.incidents import read_incidents
from support import parity
from support.guarded import BadSamples, poison
from support.models import decoder
from support.parity import Guarded, Work, build, take_steps
from support.ranks import run_ranks

STEPS = 6
WORK = Work(samples=8, steps=STEPS)


@functools.cache
def plain_losses(skipped: tuple[int, ...] = (), left_out: tuple[int, ...] = ()) -> list[float]:
    """The oracle: a bare PyTorch loop that takes no update at some steps, or has no targets in some samples."""
    model = decoder(**WORK.llama()).double()
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        fill(parameter.data, model.initial(name), seed=7, name=name, global_shape=shape, offsets=(0,) * len(shape))
    groups = [
        {"params": [p], "weight_decay": 0.1 if model.decays(n) else 0.0, "lr": WORK.lr * model.lr_scale(n)}
        for n, p in model.named_parameters()
    ]
    optimizer = torch.optim.AdamW(groups, betas=WORK.betas, eps=1e-8)
    losses: list[float] = []
    for number in range(STEPS):
        samples = [parity.sample(index) for index in range(number * WORK.samples, (number + 1) * WORK.samples)]
        for row, index in enumerate(range(number * WORK.samples, (number + 1) * WORK.samples)):
            if index in left_out:
                samples[row] = Sample(samples[row].tokens, np.full_like(samples[row].targets, IGNORED))
        batch = MicroBatch.collate(samples)
        logits = model(batch.tokens_BS, None, batch.documents)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets_BS.flatten(), ignore_index=IGNORED)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), WORK.max_norm or torch.inf)
        losses.append(loss.item())
        if number + 1 not in skipped:
            optimizer.step()
        optimizer.zero_grad()
    return losses


class Clock(Hook):
    """Knows the step under way, and the rows of all steps."""

    step = 0

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def on_step_begin(self, loop: Loop) -> None:
        self.step = loop.progress.step + 1

    def on_metrics(self, loop: Loop, row: dict[str, Any]) -> None:
        self.rows.append(row)


Found = tuple[list[float], float, str]


def spoilt(rank: int, world_size: int, parallel: ParallelConfig, folder: str, fault: str, keys: dict[str, Any]) -> Found:
    """Losses, the optimizer's count, and the message with which it ended, if it did."""
    work = Work(parallel, samples=WORK.samples, micro=8 if fault == "gradient" else 2)
    engine, clock, fired = build(work, world_size), Clock(), []
    weight = next(iter(engine.module.block_modules().values())).attention.wo.weight  # type: ignore[operator, union-attr]

    def once(step: int, factor: float) -> float:
        if rank != 1 or clock.step != step or fired:
            return 1.0
        fired.append(rank)
        return factor

    if fault == "samples":
        BadSamples(engine, 1, [19, 20])
    elif fault == "device":
        poison(weight, lambda: math.nan if rank == 1 and clock.step >= 3 else 1.0)
    elif fault == "gradient":
        seen = BadSamples(engine, 1, [19], 1.0)
        poison(weight, lambda: math.inf if seen.are_here else 1.0)
    elif fault == "passing":
        poison(weight, lambda: once(3, math.inf))
    elif fault == "new level":
        BadSamples(engine, 1, range(24, 48), 1e6, gradient=True)
    elif fault == "passing spike":
        poison(weight, lambda: once(5, 1e6))
    elif fault == "spike":
        BadSamples(engine, 1, [33], 1e6, gradient=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spikes, "WARM_UP", 3)
        said = ""
        try:
            take_steps(engine, work, range(STEPS), Guarded(folder, **keys), clock)
        except TrainingDiverged as error:
            said = str(error)
    return [row["loss"] for row in clock.rows], engine.counters()["step"], said


def equal(found: list[float], expected: list[float]) -> bool:
    """Compare losses to 1e-9; one that is not finite equals anything."""
    pairs: Iterator[tuple[float, float]] = zip(found, expected, strict=True)
    return all(not math.isfinite(one) or abs(one - two) <= 1e-9 * abs(two) for one, two in pairs)


LAYOUTS = {
    "one": (1, ParallelConfig()),
    "zero 0": (2, ParallelConfig(zero=0)),
    "zero 1": (2, ParallelConfig(zero=1)),
    "zero 3": (2, ParallelConfig(zero=3)),
    "tp 2": (2, ParallelConfig(tp=2, zero=1, sequence_parallel=False)),
}


def run(layout: str, folder: Path, fault: str, **keys: Any) -> tuple[list[Found], list[dict[str, Any]]]:
    """Return what `spoilt` found on every rank, and the run's incidents."""
    ranks, parallel = LAYOUTS[layout]
    return run_ranks(ranks, spoilt, parallel, str(folder), fault, keys), list(read_incidents(folder))


@pytest.mark.parametrize("layout", ["zero 0", "zero 1", "zero 3", "tp 2"])
def test_a_step_with_bad_samples_is_skipped_and_they_are_named(layout: str, tmp_path: Path) -> None:
    found, (incident,) = run(layout, tmp_path, "samples")
    for losses, updates, _ in found:
        assert math.isnan(losses[2]) and equal(losses, plain_losses(skipped=(3,)))
        assert updates == STEPS - 1
    assert (incident["kind"], incident["step"], incident["details"]["samples"]) == ("bad_step", 3, [19, 20])
    assert "forward pass of layer 1" in incident["message"]
    assert incident["details"]["cause"] == ("unknown" if layout == "tp 2" else "data")


def test_a_rewind_takes_the_step_again_without_the_bad_samples(tmp_path: Path) -> None:
    found, _ = run("zero 1", tmp_path, "samples", on_bad_step="rewind")
    for losses, updates, _ in found:
        assert equal(losses, plain_losses(left_out=(19, 20))) and all(map(math.isfinite, losses))
        assert updates == STEPS
    (rewind,) = read_journal(tmp_path)
    assert rewind["ranges"] == [[19, 20], [20, 21]] and (rewind["step"], rewind["to"]) == (3, 2)


@pytest.mark.parametrize("mode", ["skip", "rewind"])
def test_a_passing_fault_costs_nothing(mode: str, tmp_path: Path) -> None:
    found, incidents = run("zero 1", tmp_path, "passing", on_bad_step=mode)
    for losses, updates, _ in found:
        assert equal(losses, plain_losses()) and updates == STEPS
    assert [each["details"]["cause"] for each in incidents] == ["passing fault"]


@pytest.mark.parametrize("layout", ["zero 0", "zero 1"])
def test_a_bad_device_ends_the_run_and_is_named(layout: str, tmp_path: Path) -> None:
    found, (incident,) = run(layout, tmp_path, "device")
    for losses, updates, said in found:
        assert equal(losses, plain_losses()[:2]) and updates == 2
        assert "rank 1, gradient of a weight of layers.0.attention.wo.weight" in said and "every step on this device" in said
    assert (incident["rank"], incident["details"]["cause"]) == (1, "device")


def test_a_gradient_that_names_no_row_is_not_taken_for_the_weights(tmp_path: Path) -> None:
    """Of one micro-batch, the whole batch is suspect: what there is to be known does not depend on the micro-batch."""
    (((losses, updates, said),), (incident,)) = run("one", tmp_path, "gradient")
    assert (said, updates) == ("", STEPS - 1) and equal(losses, plain_losses(skipped=(3,)))
    assert (incident["details"]["cause"], incident["details"]["samples"]) == ("unknown", [])


def test_a_stop_leaves_the_weights_before_the_step(tmp_path: Path) -> None:
    found, _ = run("zero 1", tmp_path, "samples", on_bad_step="stop")
    for losses, updates, said in found:
        assert equal(losses, plain_losses()[:2]) and updates == 2
        assert said.startswith("step 3: loss nan") and "samples 19, 20 of the run" in said


@pytest.mark.parametrize("layout", ["one", "zero 3"])
def test_a_spike_is_skipped(layout: str, tmp_path: Path) -> None:
    found, (incident,) = run(layout, tmp_path, "spike")
    for losses, updates, _ in found:
        assert equal(losses, plain_losses(skipped=(5,))) and updates == STEPS - 1
    assert incident["step"] == 5 and "the gradient norm is" in incident["message"]
    assert incident["details"]["cause"] == ("comes again" if layout == "one" else "data")


def test_a_spike_that_does_not_come_again_costs_nothing(tmp_path: Path) -> None:
    found, (incident,) = run("zero 1", tmp_path, "passing spike")
    for losses, updates, _ in found:
        assert equal(losses, plain_losses()) and updates == STEPS
    assert (incident["step"], incident["details"]["cause"], incident["details"]["action"]) == (5, "passing fault", "redo")


def test_as_many_bad_steps_in_a_row_as_the_limit_end_the_run(tmp_path: Path) -> None:
    (((losses, _, said),), incidents) = run("one", tmp_path, "samples", bad_step_limit=1)
    assert len(losses) == 2 and "trainer.bad_step_limit" in said and len(incidents) == 1


def test_so_many_spikes_in_a_row_are_a_new_level(tmp_path: Path) -> None:
    (((losses, updates, said),), incidents) = run("one", tmp_path, "new level", bad_step_limit=2)
    assert [(each["kind"], each["step"]) for each in incidents] == [("bad_step", 4), ("bad_step", 5), ("new_level", 5)]
    assert (updates, said) == (STEPS - 2, "") and equal(losses, plain_losses(skipped=(4, 5)))


def replayed(rank: int, world_size: int, folder: str) -> list[tuple[int, bool]]:
    """The first samples of the shares that were read, and whether they were dealt by worker: every second step is measured."""
    parallel = ParallelConfig(hdp="greedy", hdp_tokens=19, zero=1)
    work = Work(parallel, samples=WORK.samples, micro=2, documents=True, steps=4)
    engine, clock, read = build(work, world_size, measures=True), Clock(), list[tuple[int, bool]]()
    weight = next(iter(engine.module.block_modules().values())).attention.wo.weight  # type: ignore[operator, union-attr]
    poison(weight, lambda: math.inf if rank == 1 and clock.step >= 4 else 1.0)
    load = HybridAssigner.load

    def seen(*arguments: Any, by_worker: bool = False) -> Any:
        read.append((arguments[2].first, by_worker))
        return load(*arguments, by_worker=by_worker)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HybridAssigner, "load", seen)
        patch.setattr(Fixed, "measures", lambda _self, progress: progress.step % 2 == 1)
        take_steps(engine, work, range(4), Guarded(folder), clock)
    return read


def test_a_measured_step_is_replayed_as_it_was_dealt(tmp_path: Path) -> None:
    """Dealt in the ordinary way its rows would lie on other ranks: a bad device might not meet them again."""
    for read in run_ranks(2, replayed, str(tmp_path)):
        assert [each for each in read if each[0] < 32] == [(0, False), (8, True), (16, False), (24, True), (24, True)]
    (incident,) = read_incidents(tmp_path)
    assert incident["step"] == 4 and "rank 1, gradient of a weight of layers.0.attention.wo.weight" in incident["message"]
