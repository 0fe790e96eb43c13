"""Checkpointer: saves a run's fragments and state, in the background or not, and says how it went."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from ..config.problems import ConfigError, Problem
from ..parallel.fragment import Fragment
from ..parallel.hosts import host_number
from .config import OBJECT_STORE_FAULT, CheckpointConfig
from .control import Control, Round
from .errors import CheckpointError, SavesFailed
from .identity import RunIdentity
from .manifest import state_fault
from .memory.tier import MemoryTier, Predecessors
from .planning.planner import FREE, Planner
from .report import SaveReport
from .saving.commit import LocalTarget, open_target
from .saving.device import Device
from .saving.save import Save
from .saving.save_context import SaveContext
from .saving.snapshot import Snapshot
from .saving.staging import StagingPool
from .writing.writer import Writer

log = logging.getLogger(__name__)

QUIET_SECONDS = 5.0  # that the end of a run may wait without saying what for


class Checkpointer:
    """Saves to one folder of checkpoints. All ranks make the same calls in the same order.

        checkpointer.begin_run(run, commit)                  # whose checkpoints they are
        checkpointer.save(step, engine.fragments(), state)   # after an update; returns at once in mode async
        …                                                    # forward and backward of the next step
        checkpointer.before_update()                         # just before the optimizer changes the tensors
        for report in checkpointer.poll(): …                 # finished and failed saves
        checkpointer.finish()                                # at the end; raises if the last save failed

    A failed save does not disturb training: it is reported, nothing of it stays under a step's name, and after
    `config.failures` in a row `poll` raises CheckpointError.
    """

    def __init__(self, folder: str | Path, control: Control, config: CheckpointConfig) -> None:
        problems = config.problems()
        if problems:
            raise ConfigError(problems)
        self.control = control
        self.config = config
        self._asynchronous = config.mode == "async"
        self._target = open_target(folder, control.rank == 0)
        try:
            self._context = self._save_context()
        except BaseException:
            self._target.close()  # or the next try would be told of another run
            raise
        self._saves: list[Save] = []
        self._leaving: list[Save] = []  # whose threads may still be at something, reported or not
        self._unlearned: list[Snapshot] = []
        self._newest_save: Save | None = None
        self._last_report: SaveReport | None = None
        self._newest = ""  # outcome of the last save that holds anything
        self._failures = 0
        self._preparing: threading.Thread | None = None
        self._context.planned.set()

    def _save_context(self) -> SaveContext:
        config, control = self.config, self.control
        limit = None if config.host_memory_gib is None else int(config.host_memory_gib * 2**30)
        in_memory = config.memory_every is not None
        local = self._target.path if isinstance(self._target, LocalTarget) else None
        if in_memory and local is None:
            raise ConfigError([Problem("checkpoint.memory_every", "needs a mounted folder to find the keepers by", "use null")])
        if config.files == "host" and local is None:
            raise ConfigError([Problem("checkpoint.files", OBJECT_STORE_FAULT, "use rank")])
        on_disk = config.snapshot_folder is not None
        count = 3 if in_memory else 1 if on_disk else 2
        pool = StagingPool(limit, count, least=2 if in_memory else 1, folder=config.snapshot_folder)
        return SaveContext(
            target=self._target,
            pool=pool,
            writer=Writer(),
            planner=Planner(host_number() if config.files == "host" else None),
            memory=MemoryTier(local, control.rank, config.memory_group, pool, config.timeout) if in_memory and local else None,
            predecessors=None if local is None else Predecessors(local),
            config=config,
        )

    def begin_run(self, run: RunIdentity, after: int = 0, step: int | None = None) -> None:
        """Say which run saves here, before the first save. Another run's checkpoints are moved aside.

        after: number of the commit that the run goes on from (`RestoreReport.commit`)
        step: its step, where that is the run's own. Until the next save it counts as the newest
        """
        if self.control.rank == 0:
            self._target.take_over(run, after, step)

    def prepare(self, fragments: Iterable[Fragment]) -> None:
        """Make the plan and the snapshot memory now, so that the first save costs no more than the others. Optional.

        In mode async a thread of its own does it, which the first save waits for. What is in its way is logged, and said again
        by the first save, which then fails for it.
        """
        held = list(fragments)
        self._meet_device(held)
        talk = self.control.begin("prepare", self.config.timeout, "checkpoint.timeout")
        self._context.planned.clear()
        if not self._asynchronous:
            self._prepare(held, talk)
            return
        self._preparing = threading.Thread(target=self._prepare, args=(held, talk), name="checkpoint-plan", daemon=True)
        self._preparing.start()

    def _prepare(self, held: list[Fragment], talk: Round) -> None:
        planner, device = self._context.planner, self._context.device
        try:
            if device is not None:
                torch.cuda.set_device(device.device)  # a thread begins on device 0, whichever its process uses
            ballot = planner.vote(talk, held, FREE)
            if talk.control.rank == 0:
                talk.broadcast(planner.decide(ballot) or b"")
            description = talk.receive("decision")
            if description:
                planner.adopt(description, talk.control.rank)
            if planner.layout.bytes:
                self._context.pool.reserve(planner.layout.bytes)
        except Exception as error:
            log.error("saves can't be prepared, and the first one will fail for it unless it is mended: %s", error)
            planner.forget()
            with contextlib.suppress(Exception):  # the store may be gone
                talk.abort(str(error))
        finally:
            self._context.planned.set()
            talk.leave()

    def save(
        self,
        step: int,
        fragments: Iterable[Fragment],
        state: dict[str, Any],
        *,
        required: bool = False,
        disk: bool = True,
        hold: bool = False,
    ) -> None:
        """Start saving. Only rank 0's state is stored.

        With `checkpoint.memory_every` set the snapshot also goes into the in-memory tier; `disk=False`: only there.

        In mode async the tensors are still being copied when this returns: `before_update` must be called before they
        change. If no snapshot memory is free because the disk is slower than the schedule, the save is skipped by all
        ranks and reported so; `required` (a final save) waits instead.

        hold: (mode async) it does not become a checkpoint before `confirm` is called for its step; `wait` and `close` give
        up a save that never was.

        Raises CheckpointError for a state that is not plain JSON; whatever else goes wrong is in the save's report.
        """
        self.before_update()  # a caller that never updates must not have two snapshots of the same tensors under way
        start = time.perf_counter()
        held = list(fragments)
        fault = state_fault(state)
        if fault is not None:
            raise CheckpointError(fault)
        self._meet_device(held)
        self._learn()
        memory = self._context.memory is not None
        assert not hold or self._asynchronous, "in mode sync nothing is left to do when this returns"
        assert disk or memory, "a save that goes nowhere: checkpoint.memory_every is not set"
        talk = self.control.begin("save", self.config.timeout, "checkpoint.timeout")
        save = Save(step, held, state, disk=disk, memory=memory, required=required, talk=talk, after=self._newest_save)
        if not hold:
            save.confirm()
        self._saves.append(save)
        self._leaving = [*(other for other in self._leaving if not other.leave(0)), save]
        self._unlearned.append(save.snapshot)
        self._newest_save = save
        try:
            if self._asynchronous:
                thread = threading.Thread(target=save.run, args=(self._context,), name=f"checkpoint-{step}", daemon=True)
                thread.start()
                save.thread = thread
            else:
                save.run(self._context)
        except Exception as error:  # no thread was to be had
            save.cancel(error)
        except BaseException as error:  # of an interruption the caller shall hear; others come after a save that has its end
            save.cancel(error)
            raise
        if save.snapshot.starves():
            save.report.stall_seconds += time.perf_counter() - start

    def confirm(self, step: int, doubt: str = "") -> None:
        """Commit the save of a step that is known to be good, if one is held; give it up if there is a doubt."""
        for save in self._saves:
            if save.step == step:
                save.confirm(doubt)

    def tell_progress(self, on_progress: Callable[[], None]) -> None:
        """Call this about once a second while a save waits for its writer and that gets on, in whichever thread waits."""
        self._context.writer.on_progress = on_progress

    @property
    def suspected(self) -> int | None:
        """A step at which something was wrong. Retention keeps the newest checkpoint before it; None: it is free."""
        return self._target.suspected

    @suspected.setter
    def suspected(self, step: int | None) -> None:
        self._target.suspected = step

    def before_update(self) -> float:
        """Wait until no snapshot needs the tensors as they are. Returns the seconds that this took on the host."""
        newest = self._newest_save
        if newest is None:
            return 0.0
        stalled = newest.snapshot.wait(self.config.timeout)
        if newest.snapshot.starves():
            newest.report.stall_seconds += stalled
        return stalled

    def poll(self) -> list[SaveReport]:
        """Saves that ended since the last call. A skipped save may be among them before an earlier one that is still written.

        Raises SavesFailed, with the reports, when `config.failures` saves in a row have failed.
        """
        reports: list[SaveReport] = []
        # The newest is asked first: one that ends meanwhile must not be told before another that it came after. And what
        # the GPU has waited for is known when it has got there; asking sooner would hold up the host.
        for save in [save for save in reversed(self._saves) if save.ended and save.snapshot.settled][::-1]:
            reports.append(self._deliver(save))
        if self._failures >= self.config.failures:
            assert self._last_report is not None
            raise SavesFailed(
                f"{self._failures} saves in a row failed, the last one at step {self._last_report.step}: "
                f"{self._last_report.reason}",
                reports,
            )
        return reports

    def wait(self) -> list[SaveReport]:
        """Wait for all saves. Returns the reports that `poll` has not given yet."""
        self._unlearned.clear()  # what this wait costs says nothing about updates
        self.before_update()
        self._give_up_held()
        reports: list[SaveReport] = []
        while self._saves:
            self._saves[0].join()
            reports.append(self._deliver(self._saves[0]))
        return reports

    def finish(self) -> list[SaveReport]:
        """Wait for all saves and give back memory and processes. Returns the reports that `poll` has not given yet.

        Raises SavesFailed, with the reports, if the last save failed.
        """
        reports = self.wait()
        self.close()
        if self._last_report is not None and self._last_report.outcome == "failed":
            raise SavesFailed(f"the last save, at step {self._last_report.step}, failed: {self._last_report.reason}", reports)
        return reports

    def close(self) -> None:
        """Give back memory, processes and the folder's lock, whatever the state of the saves. May be called twice.

        A snapshot that is newer than the last checkpoint on the disk stays in the keepers' memory for the next run.
        """
        self._give_up_held()
        if self._preparing is not None:
            self._preparing.join()
            self._preparing = None
        for save in self._leaving:
            if not save.leave(QUIET_SECONDS):
                log.warning("waiting for the save of step %d to end", save.step)
                save.leave()
        self._leaving = []
        for save in self._saves:
            self._note(save.report)
        if self._context.memory is not None:
            self._context.memory.close(keep=self._newest != "committed")
        self._context.writer.close()
        self._context.pool.close()
        self._target.close()

    def _give_up_held(self) -> None:
        for save in self._saves:
            save.confirm("the run ended before this step was known to be good")

    def _meet_device(self, held: list[Fragment]) -> None:
        """The first time that tensors are on a GPU: streams for the copies, and pinned memory to copy to."""
        device = next((fragment.tensor.device for fragment in held if fragment.tensor.is_cuda), None)
        if device is not None and self._context.device is None:
            most = self.config.device_memory_gib
            self._context.device = Device(device, None if most is None else int(most * 2**30))
            self._context.pool.pin = True

    def _learn(self) -> None:
        """Let the GPU's spare memory follow what the last saves cost, as far as that is known by now."""
        for snapshot in [snapshot for snapshot in self._unlearned if snapshot.settled]:
            self._unlearned.remove(snapshot)
            if self._context.device is not None:
                self._context.device.learn(snapshot.device_stall(), snapshot.bytes_per_second, snapshot.bytes)

    def _note(self, report: SaveReport) -> None:
        if report.outcome not in ("skipped", "unkept"):
            self._newest = report.outcome

    def _deliver(self, save: Save) -> SaveReport:
        self._saves.remove(save)
        report = save.report
        self._note(report)
        report.stall_seconds += save.snapshot.device_stall()
        if report.outcome == "failed":
            self._failures += 1
            log.error("saving step %d failed: %s", report.step, report.reason)
        elif report.outcome == "committed":
            self._failures = 0
        elif report.reason and self.control.rank == 0:  # which decides it for all, or is told by the one that can't
            log.warning("step %d was not saved: %s", report.step, report.reason)
        if report.outcome in ("committed", "failed"):
            self._last_report = report
        if self.control.rank == 0:
            try:
                self._target.record(report.as_dict())
            except OSError as error:
                log.warning("the log of saves could not be written: %s", error)
        return report
