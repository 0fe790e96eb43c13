"""One save, from the ranks' agreement to the verdict."""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..config.checkpoint import CheckpointConfig
from ..parallel.fragment import Fragment
from .arena import Arena, ArenaPool
from .commit import Target, new_token
from .control import Round
from .errors import CheckpointError
from .faults import reach
from .manifest import Manifest, StoredArray, StoredFile
from .plan import FileLayout
from .planner import Planner
from .report import SaveReport
from .snapshot import Snapshot
from .writer import Request, Writer

log = logging.getLogger(__name__)


@dataclass
class Tools:
    """What all saves of a Checkpointer share."""

    target: Target
    pool: ArenaPool
    writer: Writer
    planner: Planner
    stream: torch.cuda.Stream | None
    config: CheckpointConfig


class Save:
    """A save under way. `run` does it all, in a thread of its own or in the caller's; saves go through each stage in order.

    1. vote      every rank says whether its fragments are those of the plan in force, and whether it has memory
    2. decision  the coordinator (rank 0) says: skip, go on with the plan, or here is a new one
    3. stage     copy into the arena — the only part during which the tensors must not change
    4. write     the rank's file and its digests, durable
    5. report    every rank's digests to the coordinator, which proves coverage, commits, and announces the verdict

    Any rank's error or silence ends the round for all of them; the coordinator deletes what there is.
    """

    def __init__(
        self,
        step: int,
        fragments: Sequence[Fragment],
        state: dict[str, Any],
        required: bool,
        talk: Round,
        previous: Save | None,
    ) -> None:
        self.step = step
        self.state = state
        self.required = required
        self.talk = talk
        self.previous = previous
        self.snapshot = Snapshot(fragments)
        self.report = SaveReport(step)
        self.thread: threading.Thread | None = None
        self._staged = threading.Event()
        self._ended = threading.Event()
        self._left = threading.Event()
        self._arena: Arena | None = None
        self._token = ""
        self._layouts: list[FileLayout] = []  # of all ranks, and the arrays: this save's, whatever later saves plan
        self._arrays: dict[str, StoredArray] = {}
        self._arrays_text = ""

    @property
    def ended(self) -> bool:
        """Whether the verdict is in."""
        return self._ended.is_set()

    def join(self) -> None:
        """Wait for the verdict."""
        self._ended.wait()

    def leave(self) -> None:
        """Wait until the save's thread touches nothing any more: also the deletion of old steps is over."""
        self._left.wait()

    def run(self, tools: Tools) -> None:
        """Do it. Never raises: the report says what happened."""
        start = time.perf_counter()
        report = self.report
        try:
            if self.previous is not None:
                self.previous._staged.wait()
            self._run(tools)
        except Exception as error:
            report.outcome = "failed"
            report.reason = str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
            self._give_up(tools)
        finally:
            if self._arena is not None:
                tools.pool.take_back(self._arena)
            report.host_memory_bytes = tools.pool.bytes
            report.total_seconds = time.perf_counter() - start
            self._mark_staged()
            self._wait_for_previous()
            if self.previous is not None and self.previous.previous is not None:
                self.previous.previous.talk.forget()  # whoever votes on this save has ended that one
                self.previous.previous = None
            self._ended.set()
            if report.outcome == "committed" and self.talk.control.rank == 0:
                self._prune(tools)
            self._left.set()

    def _run(self, tools: Tools) -> None:
        report, talk, coordinator = self.report, self.talk, self.talk.control.rank == 0
        decision = self._agree(tools)
        if "skip" in decision:
            report.outcome, report.reason = "skipped", decision["skip"]
            return
        self._token = decision["token"]
        if decision["new"]:
            tools.planner.adopt(talk)
        message = self._stage_and_write(tools, tools.planner.layout)
        written_at = time.perf_counter()
        reach("report.before")
        talk.post("report", json.dumps(message).encode())
        if coordinator:
            manifest = self._manifest()
            tools.target.commit(manifest, manifest.encode(self._arrays_text), self._token)
            talk.announce("verdict", json.dumps({"bytes": manifest.bytes}).encode())
        report.total_bytes = json.loads(talk.hear("verdict"))["bytes"]
        report.commit_seconds = time.perf_counter() - written_at
        report.outcome = "committed"

    def _agree(self, tools: Tools) -> dict[str, Any]:
        """Stages 1 and 2. Returns the decision: {"skip": why} or {"token": …, "new": whether there is a new plan}."""
        planner, talk = tools.planner, self.talk
        size = planner.layout.bytes
        busy = size > 0 and not self.required and not tools.pool.has_room(size)
        reach("vote.before")
        planner.vote(talk, self.snapshot.fragments, busy)
        if talk.control.rank == 0:
            talk.announce("decision", json.dumps(self._decide(tools)).encode())
        return json.loads(talk.hear("decision"))

    def _decide(self, tools: Tools) -> dict[str, Any]:
        planner = tools.planner
        busy, new = planner.decide(self.talk)
        if busy:
            memory = f"rank {busy[0]} has no snapshot memory free, {tools.pool.bytes / 2**30:.2f} GiB in use on rank 0"
            return {"skip": f"the disk is slower than the schedule: {memory}"}
        self._layouts, self._arrays, self._arrays_text = planner.layouts, planner.arrays, planner.arrays_text
        token = new_token()
        tools.target.begin(self.step, token)
        self._token = token
        reach("decision.before")
        return {"token": token, "new": new}

    def _stage_and_write(self, tools: Tools, layout: FileLayout) -> dict[str, Any]:
        """Stages 3 and 4. The writing follows the copy, unless the writer is still at an earlier save."""
        report = self.report
        if not layout.bytes:
            self._mark_staged()
            self._wait_for_previous()
            return {}
        arena = self._arena = tools.pool.lend(layout.bytes, tools.config.timeout)
        arena.watermark.set(0)
        name, leaves = tools.target.data_names(self.talk.control.rank, self._token)
        request = Request(arena, layout.bytes, tools.target.place(self.step, self._token), name, leaves)
        follow = self.previous is None or self.previous.ended
        if follow:
            tools.writer.begin(request)
        try:
            self.snapshot.copy(arena, layout, tools.stream)
        except BaseException:
            arena.watermark.abandon()
            if follow:
                with contextlib.suppress(CheckpointError, OSError):
                    tools.writer.end()
            raise
        report.staging_seconds = self.snapshot.seconds
        self._mark_staged()
        self._wait_for_previous()
        if not follow:
            tools.writer.begin(request)
        written = tools.writer.end()
        report.hashing_seconds, report.writing_seconds = written.hashing, written.writing
        report.bytes, report.direct = written.bytes, written.direct
        return {"name": name, "bytes": written.bytes, "leaves": leaves, "blocks": written.blocks}

    def _mark_staged(self) -> None:
        self.snapshot.release()
        self._staged.set()

    def _wait_for_previous(self) -> None:
        if self.previous is not None:
            self.previous.join()

    def _manifest(self) -> Manifest:
        """Stage 5, the coordinator's part: what the ranks say they wrote must be what the plan says."""
        messages: list[dict[str, Any]] = [json.loads(text) for text in self.talk.collect("report")]
        files: list[StoredFile] = []
        for rank, (message, layout) in enumerate(zip(messages, self._layouts, strict=True)):
            if message.get("bytes", 0) != layout.bytes:
                raise CheckpointError(f"rank {rank} wrote {message.get('bytes', 0)} bytes, the plan has {layout.bytes} for it")
            if message:
                files.append(StoredFile(message["name"], message["bytes"], message["leaves"], message["blocks"]))
        return Manifest(self.step, len(messages), self.state, files, self._arrays)

    def _prune(self, tools: Tools) -> None:
        """Retention comes after the commit and can't undo it."""
        try:
            tools.target.prune(tools.config.keep)
        except OSError as error:
            log.warning("old checkpoints could not be deleted: %s", error)

    def _give_up(self, tools: Tools) -> None:
        """Tell the others, forget the plan (they may not have got it) and delete what was written."""
        try:
            self.talk.abort(self.report.reason)
        except Exception as error:  # the store is gone: the others' time-outs have to do
            log.warning("the other ranks could not be told: %s", error)
        tools.planner.forget()
        if self.talk.control.rank == 0 and self._token:
            tools.target.discard(self.step, self._token)
