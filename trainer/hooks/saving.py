"""Checkpoints of a run: when to save, what is saved beside the arrays, and how a run gets it back."""

from __future__ import annotations

from typing import Any

from ...checkpoint.checkpointer import Checkpointer
from ...checkpoint.identity import RunIdentity
from ...checkpoint.report import SaveReport
from ..loop import Loop
from .base import Hook, named


def run_state(loop: Loop, fixed: dict[str, Any]) -> dict[str, Any]:
    """The JSON part of a checkpoint: counters and the states of the controller and hooks, and `fixed` (config, data, seed).

    Schedules and the data order have no state: they are functions of the counters (rules R1, R5).
    """
    return {
        **fixed,
        "progress": loop.progress.state_dict(),
        "counters": loop.engine.counters(),
        "controller": loop.controller.state_dict(),
        "hooks": {name: state for name, hook in named(loop.hooks).items() if (state := hook.state_dict())},
    }


class Saving(Hook):
    """Saves every so many steps, and at the end of the run, however it ends in good order."""

    def __init__(self, checkpointer: Checkpointer, every: int | None, fixed: dict[str, Any]) -> None:
        self._checkpointer = checkpointer
        self._every = every
        self._memory_every = checkpointer.config.memory_every
        self._fixed = fixed
        self._saved_step = self._good_step = -1
        self._prepared = False

    def begin_run(self, run: RunIdentity, after: int) -> None:
        """Say whose checkpoints these are: see `Checkpointer.begin_run`."""
        self._checkpointer.begin_run(run, after)

    def on_run_begin(self, loop: Loop) -> None:
        """A run that begins where a checkpoint is has nothing to save yet."""
        self._saved_step = loop.progress.step

    def before_update(self, loop: Loop) -> None:
        """The one wait: a snapshot still being copied must not see the weights change."""
        self._checkpointer.before_update()

    def on_metrics(self, loop: Loop, row: dict[str, Any]) -> None:
        """A step's loss is a number: a save of it may become a checkpoint."""
        self._good_step = row["step"]
        self._checkpointer.confirm(row["step"])

    def on_step_end(self, loop: Loop) -> None:
        """Start a save when it is time to, and report those that have ended."""
        if not self._prepared and (self._every or self._memory_every):  # after a step the optimizer's state is there
            self._checkpointer.prepare(loop.engine.fragments())
            self._prepared = True
        to_disk, in_memory = (bool(every) and loop.progress.step % every == 0 for every in (self._every, self._memory_every))
        if to_disk or in_memory:
            self._save(loop, disk=to_disk)
        self._report(loop, self._checkpointer.poll())

    def _save(self, loop: Loop, *, disk: bool = True, required: bool = False) -> None:
        # A step whose loss is not a number must not become a checkpoint, but asking for its loss now would stop the GPU
        # until the next step is queued. So the save begins, and is held until the numbers arrive of themselves.
        # They have, where the step was evaluated.
        known = loop.progress.step <= self._good_step
        hold = self._checkpointer.config.mode == "async" and not required and not known
        if not hold or any(hook.waits_for_rows for hook in loop.hooks):
            loop.deliver_metrics(keep=0)
            hold = False
        state = run_state(loop, self._fixed)
        step, fragments = loop.progress.step, loop.engine.fragments()
        self._checkpointer.save(step, fragments, state, required=required, disk=disk, hold=hold)

    def _report(self, loop: Loop, reports: list[SaveReport]) -> None:
        for report in reports:
            if report.outcome == "committed":
                self._saved_step = report.step
            row = {"checkpoint_step": report.step, "checkpoint_saved": report.outcome == "committed", **report.metrics()}
            for hook in loop.hooks:
                hook.on_checkpoint(loop, row)

    def settle(self, loop: Loop) -> None:
        """Wait for saves that are under way: of a run that can't go on, they are what another one goes on from."""
        self._report(loop, self._checkpointer.wait())

    def finish(self, loop: Loop) -> None:
        """The last save, waited for. Raises CheckpointError if it failed: a run must not end well without it."""
        self._report(loop, self._checkpointer.wait())
        if loop.progress.step != self._saved_step:  # not its turn, skipped, or failed
            self._save(loop, required=True)
        self._report(loop, self._checkpointer.finish())

    def close(self) -> None:
        """Of a run that failed: see saves that are under way to their end, and give back memory, processes and the folder."""
        self._checkpointer.close()
