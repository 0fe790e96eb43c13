"""The order of a step, and what the loop counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from meshloom.data.batch import IGNORED, Sample
from meshloom.optim.batch.config import FixedConfig
from meshloom.optim.batch.controller import Fixed
from meshloom.optim.batch.statistics import GradientStatistics
from meshloom.optim.horizon import Horizon
from meshloom.optim.local.config import LocalConfig
from meshloom.optim.progress import Progress
from meshloom.parallel.config import ParallelConfig
from meshloom.parallel.engine import StepLoss
from meshloom.trainer.all_ranks import PeerFailed
from meshloom.trainer.hooks.base import Hook
from meshloom.trainer.loop import Loop, TrainingDiverged
from support import parity
from support.parity import SEQ_LEN, Work, build, take_steps
from support.ranks import run_ranks

OF_ENGINE = ("accumulate", "gradient_norm", "clip", "update", "zero_grad")


class Noted(Hook):
    """Notes when it is called, and how far the run has come then."""

    def __init__(self, calls: list[str]) -> None:
        self._calls = calls
        self.progress: list[tuple[int, int, int, int]] = []

    def on_step_begin(self, loop: Loop) -> None:
        self._calls.append("on_step_begin")

    def before_update(self, loop: Loop) -> None:
        self._calls.append("before_update")

    def on_step_end(self, loop: Loop) -> None:
        self._calls.append("on_step_end")
        now = loop.progress
        self.progress.append((now.step, now.samples, now.tokens, now.batch))


def noted(rank: int, world_size: int, steps: range) -> tuple[list[str], list[tuple[int, int, int, int]]]:
    """Calls of the engine and of a hook, in order, and the progress after each step."""
    work = Work(samples=4)
    engine = build(work, world_size)
    calls: list[str] = []

    def watched(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            calls.append(name)
            return method(*arguments)

        return call

    for name in OF_ENGINE:
        setattr(engine, name, watched(name, getattr(engine, name)))
    hook = Noted(calls)
    take_steps(engine, work, steps, hook)
    return calls, hook.progress


def test_a_step_goes_one_way_and_hooks_stand_before_the_update() -> None:
    ((calls, _),) = run_ranks(1, noted, range(2))
    step = ["on_step_begin", "accumulate", "gradient_norm", "clip", "before_update", "update", "zero_grad", "on_step_end"]
    assert calls == 2 * step


def test_progress_counts_steps_samples_and_tokens() -> None:
    ((_, progress),) = run_ranks(1, noted, range(3, 5))
    assert progress == [(4, 16, 16 * SEQ_LEN, 4), (5, 20, 20 * SEQ_LEN, 4)]


def blind(targets: Callable[[int], bool]) -> Callable[..., Sample]:
    """The samples of `parity`, of which only those have targets that `targets` says."""
    plain = parity.sample

    def sample(index: int, documents: bool = False) -> Sample:
        drawn = plain(index, documents)
        return drawn if targets(index) else Sample(drawn.tokens, np.full_like(drawn.targets, IGNORED), drawn.documents)

    return sample


def counted(rank: int, world_size: int, first: int, last: int, zero: int) -> tuple[list[float], list[float], float]:
    """Losses and norms of steps of two samples, where those in [first, last) have no targets; and Adam's count of updates."""
    work = Work(ParallelConfig(zero=zero), samples=2)
    engine = build(work, world_size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parity, "sample", blind(lambda index: not first <= index < last))
        done = take_steps(engine, work, range(3))
    return done.losses, done.norms, engine.counters()["step"]


@pytest.mark.parametrize("zero", [1, 3])
def test_a_step_without_any_target_updates_nothing(zero: int) -> None:
    for losses, norms, updates in run_ranks(2, counted, 2, 4, zero):
        assert losses[1] == norms[1] == 0.0 and min(losses[0], losses[2], norms[2]) > 0.0
        assert updates == 2


def test_a_rank_without_targets_updates_with_the_others() -> None:
    (alone,) = run_ranks(1, counted, 2, 3, 1)
    for found in run_ranks(2, counted, 2, 3, 1):
        assert found[0] == pytest.approx(alone[0], rel=1e-9) and found[1] == pytest.approx(alone[1], rel=1e-9)
        assert found[2] == 3


class Observing(Fixed):
    """A batch size that never changes, and the losses that it was shown."""

    needs_loss = True

    def __init__(self, horizon: Horizon) -> None:
        super().__init__(FixedConfig(samples=2, micro=1), horizon)
        self.losses: list[float] = []

    def observe(self, statistics: GradientStatistics | None, loss: float, progress: Progress) -> None:
        self.losses.append(loss)


class Observed(Hook):
    """Replaces the run's controller by one that observes."""

    controller: Observing

    def on_run_begin(self, loop: Loop) -> None:
        loop.controller = self.controller = Observing(loop.horizon)


def observed(rank: int, world_size: int) -> tuple[list[float], list[float]]:
    """The losses of three steps, of which the second has no target, and those that the controller observed."""
    work, hook = Work(samples=2), Observed()
    engine = build(work, world_size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parity, "sample", blind(lambda index: not 2 <= index < 4))
        return take_steps(engine, work, range(3), hook).losses, hook.controller.losses


def test_a_controller_observes_no_loss_of_a_step_without_targets() -> None:
    ((losses, seen),) = run_ranks(1, observed)
    assert len(losses) == 3 and losses[1] == 0.0
    assert seen == [losses[0], losses[2]]


class Routed(Hook):
    """Keeps how many assignments of tokens to experts each step has, as hooks are told before an update; None: nothing."""

    def __init__(self) -> None:
        self.counts: list[float | None] = []

    def before_update(self, loop: Loop) -> None:
        counts = loop.engine.assignments()
        self.counts.append(None if counts is None else float(counts.sum()))


def routed(rank: int, world_size: int) -> list[float | None]:
    """The assignments of three steps of an island, of which the first and the last have no target."""
    experts = {"count": 3, "top_k": 1, "ffn_dim": 4}
    local = LocalConfig(islands=2, inner_steps=2)
    work, hook = Work(samples=2, local=local, model=(("experts", experts),), balance=(("global_batch", 0.5),)), Routed()
    engine = build(work, world_size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parity, "sample", blind(lambda index: 2 <= index < 4))
        take_steps(engine, work, range(3), hook)
    return hook.counts


def test_a_step_without_targets_has_no_assignments() -> None:
    for first, second, third in run_ranks(2, routed):
        assert first is None and third is None
        assert second is not None and second > 0


def test_the_mean_loss_of_no_target_is_zero() -> None:
    nothing = torch.zeros((), dtype=torch.float64)
    assert float(StepLoss(nothing, nothing, {}).mean) == 0.0


def infinite(rank: int, world_size: int) -> str:
    """The message with which a run ends whose gradient is too large for its norm, while its loss is a number."""
    work = Work(samples=2, max_norm=None)
    engine = build(work, world_size)
    norm = engine.gradient_norm
    engine.gradient_norm = lambda: norm() * torch.inf  # type: ignore[method-assign]
    with pytest.raises(TrainingDiverged) as caught:
        take_steps(engine, work, range(2))
    return str(caught.value)


def test_a_gradient_norm_that_is_not_finite_ends_the_run() -> None:
    (said,) = run_ranks(1, infinite)
    assert said.startswith("step 1: loss 4.") and "gradient norm inf" in said


class Faulty(Hook):
    """Has a fault after the first step, on one rank."""

    def __init__(self, here: bool) -> None:
        self._here = here
        self.ended = 0

    def on_step_end(self, loop: Loop) -> None:
        self.ended = loop.progress.step
        if self._here and loop.progress.step == 1:
            self.fault = OSError("the disk is full")


def stopped(rank: int, world_size: int) -> tuple[str, int]:
    """The exception that ends this rank, and the steps that it has ended."""
    work, hook = Work(samples=2), Faulty(rank == 1)
    try:
        take_steps(build(work, world_size), work, range(9), hook)
    except (OSError, PeerFailed) as error:
        return str(error), hook.ended
    return "", hook.ended


def test_a_fault_of_one_rank_ends_all_at_the_same_step() -> None:
    (peer, steps), (own, own_steps) = run_ranks(2, stopped)
    assert own == "the disk is full" and peer == "another rank failed"
    assert steps == own_steps == 2
