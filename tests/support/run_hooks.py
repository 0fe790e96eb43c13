"""Hooks that tests put into a run by their `_target_`."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import torch

from meshloom.config.problems import ConfigError, Problem
from meshloom.trainer.hooks.base import Hook
from meshloom.trainer.loop import Loop


class Signal(Hook):
    """Sends a signal to its own process, on one rank only."""

    def __init__(self, step: int, rank: int, name: str) -> None:
        self.step, self.rank, self.number = step, rank, signal.Signals[name]

    def on_step_end(self, loop: Loop) -> None:
        if loop.progress.step == self.step and loop.mesh.rank == self.rank:
            os.kill(os.getpid(), self.number)


class Poison(Hook):
    """Makes a weight NaN before a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    @torch.no_grad()
    def on_step_begin(self, loop: Loop) -> None:
        if loop.progress.step + 1 == self.step:
            for fragment in loop.engine.fragments():
                if fragment.name == "norm.weight" and fragment.role == "weight":
                    fragment.tensor.fill_(float("nan"))


class Fail(Hook):
    """Ends the run with an error of its own."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, loop: Loop) -> None:
        if loop.progress.step == self.step:
            raise RuntimeError("a fault of the hook's")


class Refuse(Hook):
    """Can't begin on one rank, for its config or for want of room."""

    alone = True

    def __init__(self, rank: int, config: bool) -> None:
        self.rank, self.config = rank, config

    def on_run_begin(self, loop: Loop) -> None:
        if loop.mesh.rank == self.rank:
            raise ConfigError([Problem("trainer.hooks", "no key")]) if self.config else OSError("no room")


class Name(Hook):
    """Belongs to one run: writes down which one."""

    of_one_run = True

    def __init__(self) -> None:
        self.name = ""

    def on_run_begin(self, loop: Loop) -> None:
        self.name = self.name or loop.output_dir.name
        (loop.output_dir / "name").write_text(self.name)

    def state_dict(self) -> dict[str, str]:
        return {"name": self.name}

    def load_state_dict(self, state: dict[str, str]) -> None:
        self.name = state["name"]


class Arrivals(Hook):
    """Writes down when steps begin and when their numbers come."""

    def on_step_begin(self, loop: Loop) -> None:
        self._note(loop, f"begin {loop.progress.step + 1}")

    def on_metrics(self, loop: Loop, row: dict[str, Any]) -> None:
        self._note(loop, f"row {row['step']}")

    def _note(self, loop: Loop, line: str) -> None:
        with (loop.output_dir / "arrivals").open("a") as file:
            file.write(f"{line}\n")


class Jolt(Hook):
    """Multiplies the gradient of some steps: a spike that comes again however often they are taken.

    factor  None: that makes it no number
    island  on which it does so; None: on all
    """

    def __init__(self, first: int, last: int, factor: float | None = 1e6, samples: int = 8, island: int | None = None) -> None:
        self.first, self.last, self.samples, self.island = first, last, samples, island
        self.factor = float("nan") if factor is None else factor

    def on_run_begin(self, loop: Loop) -> None:
        if self.island not in (None, loop.mesh.island_number):
            return
        norm = loop.engine.gradient_norm

        def spoilt() -> torch.Tensor:
            inside = self.first <= loop.progress.samples // self.samples + 1 <= self.last
            data = loop.batches.samples[loop.progress.samples]
            return norm() * self.factor if inside and data.tokens.any() else norm()

        loop.engine.gradient_norm = spoilt  # type: ignore[method-assign]


class FlipBit(Hook):
    """Flips a bit of a weight on one rank, once in the life of the output folder."""

    def __init__(self, step: int, rank: int) -> None:
        self.step, self.rank = step, rank

    @torch.no_grad()
    def on_step_begin(self, loop: Loop) -> None:
        done = loop.output_dir / "flipped"
        if loop.progress.step + 1 == self.step and loop.mesh.rank == self.rank and not done.exists():
            done.touch()
            for fragment in loop.engine.fragments():
                if fragment.name == "norm.weight" and fragment.role == "weight":
                    fragment.tensor[1:2].view(torch.int64).bitwise_xor_(1 << 48)


class Slow(Hook):
    """Makes the forward passes of one rank longer."""

    def __init__(self, rank: int, seconds: float) -> None:
        self.rank, self.seconds = rank, seconds

    def on_run_begin(self, loop: Loop) -> None:
        if loop.mesh.rank == self.rank:
            loop.engine.module.register_forward_pre_hook(lambda *_: time.sleep(self.seconds))


class SlowLayer(Hook):
    """Makes the forward passes of one rank longer, inside the attention of its first layer."""

    def __init__(self, rank: int, seconds: float) -> None:
        self.rank, self.seconds = rank, seconds

    def on_run_begin(self, loop: Loop) -> None:
        if loop.mesh.rank == self.rank:
            stage: Any = loop.engine.module
            block = next(iter(stage.block_modules().values()))
            block.attention.register_forward_pre_hook(lambda *_: time.sleep(self.seconds))
