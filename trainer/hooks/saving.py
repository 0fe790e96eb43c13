"""Save checkpoints of a run: when, and with which state beside the arrays."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ...checkpoint.checkpointer import Checkpointer
from ...checkpoint.errors import SavesFailed
from ...checkpoint.identity import RunIdentity
from ...checkpoint.report import SaveReport
from ...optim.progress import Progress
from ...parallel.fragment import Fragment
from ...parallel.heartbeat import Phase
from ..all_ranks import raise_on_all_ranks
from ..loop import Loop
from ..watch.incidents import Incident, IncidentLog
from ..watch.rank import find_rank
from .base import Hook, hooks_by_name


def run_state(loop: Loop, fixed: dict[str, Any], absent: Mapping[str, Any]) -> dict[str, Any]:
    """Return the JSON part of a checkpoint: `fixed` (config, data, …), counters, and the states of controller and hooks.

    absent: name → state of hooks that the run had before, and may have again

    Schedules and the data order have no state: they are functions of the counters (rules R1, R5).
    """
    guard = {} if loop.guard is None else {"guard": loop.guard.state_dict(), "rewinds": loop.guard.journal.as_json()}
    return {
        **fixed,
        **guard,
        "progress": loop.progress.state_dict(),
        "counters": loop.engine.counters(),
        "controller": loop.controller.state_dict(),
        "hooks": {
            **absent,
            **{name: state for name, hook in hooks_by_name(loop.hooks).items() if (state := hook.state_dict())},
        },
    }


def saved_fragments(loop: Loop) -> Iterator[Fragment]:
    """Yield the arrays of a checkpoint of this moment, of this rank: the engine's, and under islands what their guards know."""
    yield from loop.engine.fragments()
    if loop.island_statistics is not None:
        yield from loop.island_statistics.to_save()


class Saving(Hook):
    """Saves every so many steps, and at the end of a run that reached its end or was asked to stop.

    fixed    JSON state that stays the same
    of_data  progress → JSON state that depends on it
    """

    def __init__(
        self,
        checkpointer: Checkpointer,
        every: int | None,
        fixed: dict[str, Any],
        of_data: Callable[[Progress], dict[str, Any]] = lambda _: {},
    ) -> None:
        self._checkpointer = checkpointer
        self._every = every
        self._memory_every = checkpointer.config.memory_every
        self._fixed = fixed
        self._of_data = of_data
        self._saved_step = self._finite_step = -1
        self._prepared = False
        self._incidents: IncidentLog | None = None
        self._absent: dict[str, Any] = {}
        self._held: dict[int, dict[str, Any]] = {}  # step → state of a save that waits for the step's numbers

    def keep_states(self, states: Mapping[str, Any]) -> None:
        """Keep in further checkpoints the states of hooks that this segment of the run lacks, such as the id of a wandb run."""
        self._absent = dict(states)

    @property
    def saved_step(self) -> int:
        """The newest step that this run has saved or resumed from; 0: there is none."""
        return max(0, self._saved_step)

    def begin_run(self, run: RunIdentity, after: int, step: int | None) -> None:
        """Set the run that the checkpoints belong to: see `Checkpointer.begin_run`."""
        self._checkpointer.begin_run(run, after, step)

    def on_run_begin(self, loop: Loop) -> None:
        """Count the step that the run resumed from as saved."""
        self._saved_step = loop.progress.step
        heartbeat = loop.mesh.heartbeat
        self._checkpointer.tell_progress(lambda: heartbeat.go_on(Phase.SAVE))

    def before_update(self, loop: Loop) -> None:
        """Wait for a snapshot that is still being copied, before the weights change."""
        self._checkpointer.before_update()

    def on_metrics(self, loop: Loop, row: dict[str, Any]) -> None:
        """Confirm a step whose loss is finite: a save of it may become a checkpoint."""
        self._finite_step = step = row["step"]
        self._checkpointer.suspected = None if loop.guard is None else loop.guard.suspected
        state = self._held.pop(step, None)
        if state is not None and loop.guard is not None:  # only now is it known whether the step was taken
            state["guard"] = loop.guard.state_dict()
            if row.get("skipped"):
                state["counters"] = loop.engine.counters()
        self._checkpointer.confirm(step)

    def on_repeat(self, loop: Loop, step: int) -> None:
        """Give up the save of a step that is taken again."""
        self._held.pop(step, None)
        self._checkpointer.confirm(step, f"step {step} is taken again")

    def on_step_end(self, loop: Loop) -> None:
        """Start a save if one is due, and report those that have ended."""
        if not self._prepared and (self._every or self._memory_every):  # the optimizer has its state only after a step
            self._checkpointer.prepare(saved_fragments(loop))
            self._prepared = True
        to_disk, in_memory = (bool(every) and loop.progress.step % every == 0 for every in (self._every, self._memory_every))
        if to_disk or in_memory:
            self._save(loop, disk=to_disk)
        if self.fault is not None:
            return
        try:
            self._report(loop, self._checkpointer.poll())
        except SavesFailed as error:  # saves end on each rank in their own time: the ranks must not stop at different steps
            self.fault = error
            self._report(loop, error.reports)

    def _save(self, loop: Loop, *, disk: bool = True, required: bool = False) -> None:
        loop.mesh.heartbeat.beat(Phase.SAVE)
        # A step whose loss is not finite must not become a checkpoint. But reading the loss now would leave the GPU idle
        # until the next step is queued. So the save starts, and is committed only when the numbers have arrived.
        # After an evaluation they already have. Islands don't start one that they may have to give up: where one of them took
        # its step again, its next save would meet another step's of the others.
        known = loop.progress.step <= self._finite_step
        hold = self._checkpointer.config.mode == "async" and not required and not known and loop.engine.islands is None
        if not hold or any(hook.waits_for_rows for hook in loop.hooks):
            if not loop.deliver_metrics(keep=0):  # the step is taken again, and saved then
                return
            hold = False
        state = run_state(loop, self._fixed | self._of_data(loop.progress), self._absent)
        if hold:
            self._held[loop.progress.step] = state
        step, fragments = loop.progress.step, saved_fragments(loop)
        self._checkpointer.save(step, fragments, state, required=required, disk=disk, hold=hold)
        loop.mesh.heartbeat.beat(Phase.HOOKS)

    def _report(self, loop: Loop, reports: list[SaveReport]) -> None:
        if reports and self._incidents is not None:
            self._incidents.retry()
        for report in reports:
            if report.outcome == "committed":
                self._saved_step = report.step
                loop.mesh.heartbeat.learn(Phase.SAVE, report.total_seconds)
            elif report.outcome == "failed":
                self._note_failure(loop, report)
            row = {"checkpoint_step": report.step, "checkpoint_saved": report.outcome == "committed", **report.metrics()}
            for hook in loop.hooks:
                hook.on_checkpoint(loop, row)

    def _note_failure(self, loop: Loop, report: SaveReport) -> None:
        """Keep a failed save in the run's incidents: rank 0 does."""
        if not loop.mesh.is_main:
            return
        if self._incidents is None:
            self._incidents = IncidentLog(loop.output_dir)
        rank = report.culprit
        host, pid = (None, None) if rank is None else find_rank(loop.output_dir, rank)
        message, details = f"saving step {report.step} failed: {report.reason}", {"reason": report.reason}
        self._incidents.write(
            Incident("save_failed", message, report.step, rank, host, pid, phase=Phase.SAVE.word, details=details)
        )

    def wait(self, loop: Loop) -> None:
        """Wait for saves that are under way, so that a run that can't continue leaves its newest checkpoint."""
        loop.mesh.heartbeat.beat(Phase.SAVE)
        self._report(loop, self._checkpointer.wait())

    def finish(self, loop: Loop) -> None:
        """Save a last time and wait. If that fails on a rank, all raise: a run without its last save has not succeeded.

        Raises SavesFailed where it failed, and PeerFailed on the other ranks.
        """
        loop.mesh.heartbeat.beat(Phase.SAVE)
        self._report(loop, self._checkpointer.wait())
        if loop.mesh.any(loop.progress.step != self._saved_step):  # not its turn, skipped, or failed
            self._save(loop, required=True)
        loop.mesh.heartbeat.beat(Phase.SAVE)
        try:
            self._report(loop, raise_on_all_ranks(loop.mesh, self._checkpointer.finish))
        except SavesFailed as error:
            self._report(loop, error.reports)
            raise

    def close(self) -> None:
        """Wait for saves under way, and release memory, processes and the folder's lock."""
        self._checkpointer.close()
        if self._incidents is not None:
            self._incidents.retry()
