"""The order of a step, and what the loop counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from meshloom.trainer.hooks.base import Hook
from meshloom.trainer.loop import Loop
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
