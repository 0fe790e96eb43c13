"""One save, from the ranks' agreement to the verdict."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import logging
import os
import threading
import time
import zlib
from collections.abc import Sequence
from typing import Any

import torch

from ...parallel.fragment import Fragment
from ..control import Round
from ..errors import CheckpointError
from ..faults import reach
from ..identity import RunIdentity
from ..manifest import Manifest
from ..planning.plan import NO_FILE, NOTHING, FileLayout
from ..planning.planner import DISK_BUSY, FREE, NO_MEMORY
from ..report import SaveReport, culprit_of
from ..stored_file import StoredFile, data_file_names, host_file_name
from ..writing.writer import Request
from .commit import NO_ROOM, new_token
from .file_report import FileReport, failure, failure_in, join_reports, segments_of
from .progress import SavePhase, SaveProgress
from .save_context import SaveContext
from .snapshot import Snapshot
from .staging import StagingBuffer
from .turn import Turn

log = logging.getLogger(__name__)


class Save:
    """A save under way. `run` does it all, in a thread of its own or in the caller's; `progress` says how far it is.

    1. vote      every rank says what it holds, if that has changed, and whether it has memory
    2. decision  the coordinator (rank 0) says: skip, go on with the plan, or derive a new one; to the disk, into memory
    3. snapshot  copy into the staging buffer — the only part during which the tensors must not change
    4. keep      (into memory) give the staging buffer to the keeper; complete when every rank's keeper has it and its parity
    5. write     (to the disk) the rank's file and its digests, durable; it follows the copy
    6. report    every file's digest to the coordinator, which commits what the plan has proved, and announces the verdict

    Any rank's error or silence ends the round for all of them; the coordinator deletes what there is.
    """

    def __init__(
        self,
        step: int,
        fragments: Sequence[Fragment],
        state: dict[str, Any],
        *,
        disk: bool,
        memory: bool,
        required: bool,
        talk: Round,
        after: Save | None,
    ) -> None:
        self.step = step
        self.state = state
        self.disk = disk
        self.memory = memory
        self.required = required
        self.talk = talk
        self.progress = SaveProgress()
        self.turn = Turn(self.progress, None if after is None else after.turn, disk=disk, memory=memory)
        self.snapshot = Snapshot(fragments)
        self.report = SaveReport(step)
        self.thread: threading.Thread | None = None  # where it runs, once it does
        self._confirmed = threading.Event()
        self._doubt = ""
        self._claim = threading.Lock()  # whoever gets it runs the save, or says that nobody does
        self._buffer: StagingBuffer | None = None
        self._writing = False
        self._token = ""
        self._whole = NOTHING  # of all ranks: this save's, whatever later saves plan
        self._identity: RunIdentity | None = None
        self._commit = 0

    @property
    def ended(self) -> bool:
        """Return whether the save has its outcome."""
        return self.progress.ended

    def confirm(self, doubt: str = "") -> None:
        """Let the save become a checkpoint or, if there is a doubt about its step, give it up. The first word stands."""
        if not self._confirmed.is_set():
            self._doubt = doubt
            self._confirmed.set()

    def join(self) -> None:
        """Wait for the verdict."""
        self.progress.wait(SavePhase.ENDED)

    def leave(self, timeout: float | None = None) -> bool:
        """Wait until the save's thread is over, and with it the deletion of old steps. Returns whether it is."""
        left = self.progress.wait(SavePhase.LEFT, timeout)
        if left and self.thread is not None:
            self.thread.join()  # whose last line it has just come to
        return left

    def cancel(self, error: BaseException) -> None:
        """End a save that was never begun, here and on the other ranks; one that was ends by itself."""
        if self._claim.acquire(blocking=False):
            self._fail(error)
            self._tell()
            self._end()
            self.progress.reach(SavePhase.LEFT)

    def run(self, context: SaveContext) -> None:
        """Do it. The report says what happened; only what interrupts the caller (KeyboardInterrupt) is raised again."""
        if not self._claim.acquire(blocking=False):
            return
        start = time.perf_counter()
        report = self.report
        try:
            context.planned.wait()
            self.turn.wait_for_tensors()
            if context.device is not None:
                torch.cuda.set_device(context.device.device)  # a thread begins on device 0, whichever its process uses
            self._run(context)
        except BaseException as error:
            self._fail(error)
            if not isinstance(error, Exception) and self._writing:
                context.writer.abandon()  # whoever interrupts does not want to wait for a disk
            self._give_up(context)
            if not isinstance(error, Exception):
                raise
        finally:
            if self._buffer is not None:
                context.pool.take_back(self._buffer)
                self._buffer = None
            report.host_memory_bytes = context.pool.bytes
            report.total_seconds = time.perf_counter() - start
            self._end()
            try:
                if self.talk.control.rank == 0:
                    self._tidy(context)
            finally:
                with contextlib.suppress(Exception):  # the store may be gone
                    self.talk.leave()
                self.progress.reach(SavePhase.LEFT)

    def _fail(self, error: BaseException) -> None:
        self.report.outcome = "failed" if self.disk else "unkept"
        self.report.reason = str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
        if any(
            os.strerror(full) in self.report.reason for full in (errno.ENOSPC, errno.EDQUOT)
        ):  # also of the writer's process
            self.report.reason += f"; {NO_ROOM}"
        self.report.culprit = None if self._doubt else culprit_of(self.report.reason, self.talk.control.rank)

    def _end(self) -> None:
        self._release_tensors()
        self.turn.forget_ended()
        self.progress.reach(SavePhase.ENDED)

    def _run(self, context: SaveContext) -> None:
        report, talk = self.report, self.talk
        decision, description = self._agree(context)
        talk.control.forget(decision["left"])
        if "skip" in decision:
            report.outcome, report.reason = "skipped", decision["skip"]
            return
        self._token = decision["token"]
        if description:
            context.planner.adopt(description, talk.control.rank)
        self.disk, report.reason = decision["disk"], decision["reason"]
        layout = context.planner.layout  # this save's, whatever later saves plan
        if self.memory:
            assert context.memory is not None and context.predecessors is not None
            unkept = context.memory.arrange(talk, layout.bytes, context.predecessors)
            if unkept:
                self.memory = False
                self._not_kept(unkept)
        if not self.disk and not self.memory:
            return
        request = self._take_snapshot(context, layout)
        self._confirmed.wait()
        if self._doubt:
            raise CheckpointError(self._doubt)
        if self.memory:
            self._keep(context, layout)
        self.progress.reach(SavePhase.KEPT)
        if self.disk:
            self._write(context, request, layout)

    def _agree(self, context: SaveContext) -> tuple[dict[str, Any], bytes]:
        """Vote, and hear the decision. Return it ({"skip": why}, or what to do) and, for a new plan, the state of all ranks."""
        planner, talk = context.planner, self.talk
        size = planner.layout.bytes
        reach("vote.before")
        note = FREE
        if not self.required:
            if self.memory and self.disk and not self.turn.writer_is_free:
                note = DISK_BUSY
            if size > 0 and not context.pool.has_room(size):
                note = NO_MEMORY
        ballot = planner.vote(talk, self.snapshot.fragments, note, self.step)
        if talk.control.rank == 0:
            decision, description = self._decide(context, ballot)
            talk.broadcast(json.dumps({**decision, "left": ballot["left"]}).encode() + b"\n" + description)
        line, _, description = talk.receive("decision").partition(b"\n")
        return json.loads(line), description

    def _decide(self, context: SaveContext, ballot: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        planner, obstacles = context.planner, ballot["obstacles"]
        description = planner.decide(ballot) or b""
        disk, reason = self.disk, ""
        taken = f"{context.pool.bytes / 2**30:.2f} GiB of snapshots in use on rank 0"
        if NO_MEMORY in obstacles:
            slow = "disk or the keepers are" if self.memory else "disk is"
            why = f"the {slow} slower than the schedule: rank {obstacles[NO_MEMORY]} has no memory free, {taken}"
            return {"skip": why}, b""
        if DISK_BUSY in obstacles:
            reason = f"the disk is slower than the schedule: rank {obstacles[DISK_BUSY]} is still at an earlier save, {taken}"
            disk = False
        self._whole = planner.whole
        self._identity, self._commit = context.target.run, context.target.next_commit()  # in memory and on the disk the same
        token = new_token()
        if disk:
            self._make_room(context, self._whole.bytes)
            context.target.begin(self.step, token)
        self._token = token
        if context.predecessors is not None and context.memory is None:
            context.predecessors.find(set())
        reach("decision.before")
        return {"token": token, "disk": disk, "reason": reason}, description

    def _take_snapshot(self, context: SaveContext, layout: FileLayout) -> Request | None:
        """Copy the tensors. The writer, if it is free, begins at once and follows the copy. Return its request."""
        if not layout.bytes and not self.memory:
            self._release_tensors()
            return None
        buffer = self._buffer = context.pool.lend(layout.bytes, context.config.timeout)
        buffer.watermark.set(0)
        request = None
        if self.disk and layout.bytes:
            folder = context.target.place(self.step, self._token)
            if layout.segment is None:
                name, leaves = data_file_names(self.talk.control.rank, context.target.suffix(self._token))
                request = Request(buffer, layout.bytes, folder, name, leaves)
            else:
                request = Request(buffer, layout.bytes, folder, host_file_name(layout.segment.host), "", layout.segment.start)
        follow = request is not None and self.turn.writer_is_free
        if follow and request is not None:
            self._writing = True
            context.writer.begin(request)
        if layout.bytes:
            self.snapshot.copy(buffer, layout, context.device)
        self.report.staging_seconds = self.snapshot.seconds
        self._release_tensors()
        if request is not None and not follow:
            self.turn.wait_for_writer()
            self._writing = True
            context.writer.begin(request)
        return request

    def _keep(self, context: SaveContext, layout: FileLayout) -> None:
        """Give the snapshot to the keepers. A failure here is reported and costs nothing but this version."""
        assert context.memory is not None and self._buffer is not None
        talk = self.talk
        start = time.perf_counter()
        self.turn.wait_for_keepers()
        try:
            digest = context.memory.hold(self._buffer, layout.bytes, self._token, self.step)
            message = FileReport.of(talk.control.rank, layout, digest)
        except CheckpointError as error:
            message = failure(str(error))
        reach("keep.posted.before")
        verdict = talk.agree("kept", message, join_reports, functools.partial(self._judge_kept, context))
        fault = json.loads(verdict)["error"]
        if fault is None:
            reach("keep.complete.before")
            try:
                context.memory.complete(self._buffer, self._token, talk)
            except CheckpointError as error:  # the others keep it, with what makes this rank's part again
                fault = str(error)
            reach("keep.complete.after")
        if fault is None:
            self.report.outcome = "kept"
        else:
            self._not_kept(fault)
            with contextlib.suppress(CheckpointError):
                context.memory.drop(self._token)
        self.report.keeping_seconds = time.perf_counter() - start

    def _judge_kept(self, context: SaveContext, reports: bytes) -> bytes:
        """The coordinator's verdict on a version in memory; those that keep its manifest find it left for them."""
        fault = failure_in(reports)
        if fault is None:
            assert context.memory is not None
            manifest = self._manifest([report.file("") for report in FileReport.read_all(reports)], "")
            context.memory.leave_manifest(self.talk, zlib.compress(manifest.encode(self._whole.text), 1))
        return json.dumps({"error": fault}).encode()

    def _not_kept(self, fault: str) -> None:
        log.warning("step %d is not kept in memory: %s", self.step, fault)
        self.report.reason = f"not kept in memory: {fault}"
        self.report.outcome = "unkept"  # and, if it goes to the disk, what comes of that

    def _commit_all(self, context: SaveContext, reports: bytes) -> bytes:
        """The coordinator's part, once all files are written."""
        hosts, suffix = self._whole.hosts, context.target.suffix(self._token)
        said = FileReport.read_all(reports, segments=bool(hosts))
        files = segments_of(said, hosts) if hosts else [report.file(suffix) for report in said]
        manifest = self._manifest(files, suffix)
        context.target.commit(manifest, manifest.encode(self._whole.text), self._token)
        return json.dumps({"bytes": manifest.bytes}).encode()

    def _write(self, context: SaveContext, request: Request | None, layout: FileLayout) -> None:
        """Write this rank's file, and report it."""
        report, talk = self.report, self.talk
        message = FileReport.of(talk.control.rank, NO_FILE, "")
        if request is not None:
            written = context.writer.end(context.config.timeout)
            self._writing = False
            report.hashing_seconds, report.writing_seconds = written.hashing, written.writing
            report.bytes, report.direct = written.bytes, written.direct
            if written.bytes != layout.bytes:
                raise CheckpointError(
                    f"rank {talk.control.rank} wrote {written.bytes} bytes, the plan has {layout.bytes} for it"
                )
            if layout.segment is None:
                message = FileReport.of(talk.control.rank, layout, written.digest)
            else:
                message = FileReport.of_segment(talk.control.rank, layout, written)
        self.progress.reach(SavePhase.WRITTEN)  # before the wait: the next save may write while this one waits to commit
        self.turn.wait_to_commit()
        written_at = time.perf_counter()
        reach("report.before")
        verdict = talk.agree("report", message, join_reports, functools.partial(self._commit_all, context))
        report.total_bytes = json.loads(verdict)["bytes"]
        report.commit_seconds = time.perf_counter() - written_at
        report.outcome = "committed"

    def _release_tensors(self) -> None:
        self.snapshot.release()
        self.progress.reach(SavePhase.SNAPSHOTTED)

    def _manifest(self, files: list[StoredFile], suffix: str) -> Manifest:
        """The coordinator's part: what the ranks say they wrote must be as much as there is."""
        written, whole = sum(file.bytes - file.header for file in files), self._whole
        if written != whole.bytes:
            raise CheckpointError(f"the ranks wrote {written} bytes, and the arrays have {whole.bytes}")
        world, run, commit = self.talk.control.world_size, self._identity, self._commit
        return Manifest(
            self.step, world, self.state, files, whole.arrays, run=run, commit=commit, suffix=suffix, tilings=whole.tilings
        )

    def _make_room(self, context: SaveContext, size: int) -> None:
        """Delete old steps first where the disk has no room; the save finds out for itself what could not be made."""
        try:
            with context.tidying:
                context.target.make_room(self.step, size, context.config.keep)
        except (OSError, CheckpointError) as error:
            log.warning("no room could be made for step %d: %s", self.step, error)

    def _tidy(self, context: SaveContext) -> None:
        """Delete what earlier saves and runs have left, once this one is safe. A failure here never undoes the save."""
        try:
            with context.tidying:
                if self.report.outcome == "committed":
                    context.target.prune(context.config.keep)
                if self.report.outcome in ("committed", "kept") and context.predecessors is not None:
                    context.predecessors.dismiss()
        except Exception as error:  # also those that libraries of object stores have of their own
            log.warning("old checkpoints could not be deleted: %s: %s", type(error).__name__, error)

    def _tell(self) -> None:
        """Say to the other ranks that this save has ended badly."""
        try:
            self.talk.abort(self.report.reason)
        except Exception as error:  # the store is gone: the others' time-outs have to do
            log.warning("the other ranks could not be told: %s", error)

    def _give_up(self, context: SaveContext) -> None:
        """Tell the others, forget the plan (they may not have got it), stop the writer and delete what was written."""
        self._tell()
        if self._writing and context.writer.busy and self._buffer is not None:
            self._buffer.watermark.abandon()
            with contextlib.suppress(Exception):  # whatever it was: this save has failed already
                context.writer.end(context.config.timeout)
        context.planner.forget()
        if context.memory is not None:
            context.memory.forget()
        if self.talk.control.rank == 0 and self._token:
            try:
                context.target.discard(self.step, self._token)
            except Exception as error:
                log.warning("what is left of step %d could not be deleted: %s: %s", self.step, type(error).__name__, error)
