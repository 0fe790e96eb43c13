"""One save, from the ranks' agreement to the verdict."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..config.checkpoint import CheckpointConfig
from ..parallel.fragment import Box, Fragment
from .arena import Arena, ArenaPool
from .commit import Target, new_token
from .control import Round
from .errors import CheckpointError
from .faults import reach
from .manifest import Manifest, StoredArray, StoredFile
from .plan import Declaration, FileLayout, Piece, fill_boxes, lay_out, make_plan, pack, signature, unpack
from .report import SaveReport
from .snapshot import Snapshot
from .writer import Writer

log = logging.getLogger(__name__)


@dataclass
class Plans:
    """The plan in force, kept from save to save. The lower half is the coordinator's."""

    signature: str = ""
    layout: FileLayout = field(default_factory=lambda: FileLayout(b"", (), 0))
    declared: list[tuple[Declaration, ...]] = field(default_factory=list)
    signatures: list[str] = field(default_factory=list)
    layouts: list[FileLayout] = field(default_factory=list)
    arrays: dict[str, StoredArray] = field(default_factory=dict)


@dataclass
class Tools:
    """What all saves of a Checkpointer share."""

    target: Target
    pool: ArenaPool
    writer: Writer
    plans: Plans
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
        declarations: tuple[Declaration, ...],
        state: dict[str, Any],
        required: bool,
        talk: Round,
        previous: Save | None,
    ) -> None:
        self.step = step
        self.declarations = declarations
        self.state = state
        self.required = required
        self.talk = talk
        self.previous = previous
        self.snapshot = Snapshot(fragments)
        self.report = SaveReport(step)
        self.thread: threading.Thread | None = None
        self._staged = threading.Event()
        self._ended = threading.Event()
        self._arena: Arena | None = None
        self._token = ""
        self._layouts: list[FileLayout] = []  # of all ranks, and the arrays: this save's, whatever later saves plan
        self._arrays: dict[str, StoredArray] = {}

    @property
    def ended(self) -> bool:
        """Whether the verdict is in."""
        return self._ended.is_set()

    def join(self) -> None:
        """Wait for the verdict."""
        self._ended.wait()

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
            self.snapshot.release()
            self._staged.set()
            if self.previous is not None:
                self.previous.join()
                if self.previous.previous is not None:
                    self.previous.previous.talk.forget()
                    self.previous.previous = None
            self._ended.set()

    def _run(self, tools: Tools) -> None:
        report, plans = self.report, tools.plans
        decision = self._agree(tools)
        if "skip" in decision:
            report.outcome, report.reason = "skipped", decision["skip"]
            return
        self._token = decision["token"]
        if decision["new"]:
            pieces = [Piece(source, Box(tuple(offsets), tuple(shape))) for source, offsets, shape in self._own_pieces()]
            plans.layout = lay_out(self.declarations, pieces)
            plans.signature = signature(self.declarations)
        layout = plans.layout
        if layout.bytes:
            self._arena = tools.pool.lend(layout.bytes, tools.config.timeout)
            self.snapshot.copy(self._arena, layout, tools.stream)
            report.staging_seconds = self.snapshot.seconds
        self.snapshot.release()
        self._staged.set()
        if self.previous is not None:
            self.previous.join()
        message: dict[str, Any] = {}
        if self._arena is not None:
            name, leaves = tools.target.data_names(self.talk.control.rank, self._token)
            folder = tools.target.place(self.step, self._token)
            written = tools.writer.write(self._arena, layout.bytes, folder, name, leaves)
            report.hashing_seconds, report.writing_seconds = written.hashing, written.writing
            report.bytes, report.direct = written.bytes, written.direct
            message = {"name": name, "bytes": written.bytes, "leaves": leaves, "blocks": written.blocks}
        written_at = time.perf_counter()
        reach("report.before")
        self.talk.post("report", json.dumps(message).encode())
        if self.talk.control.rank == 0:
            manifest = self._manifest()
            tools.target.commit(manifest, self._token)
            verdict = {"bytes": manifest.bytes, "pruned": self._prune(tools)}
            self.talk.announce("verdict", json.dumps(verdict).encode())
        verdict = json.loads(self.talk.hear("verdict"))
        report.commit_seconds = time.perf_counter() - written_at
        report.total_bytes, report.pruned, report.outcome = verdict["bytes"], verdict["pruned"], "committed"

    def _agree(self, tools: Tools) -> dict[str, Any]:
        """Stages 1 and 2. Returns the decision: {"skip": why} or {"token": …, "new": whether there is a new plan}."""
        plans, talk = tools.plans, self.talk
        mine = signature(self.declarations)
        changed = mine != plans.signature
        busy = not changed and bool(plans.layout.bytes) and not tools.pool.has_room(plans.layout.bytes) and not self.required
        reach("vote.before")
        talk.post("vote", mine.encode() + (b"B" if busy else b"F") + (pack(self.declarations) if changed else b""))
        if talk.control.rank == 0:
            talk.announce("decision", json.dumps(self._decide(tools, talk.collect("vote"))).encode())
        return json.loads(talk.hear("decision"))

    def _decide(self, tools: Tools, votes: list[bytes]) -> dict[str, Any]:
        plans = tools.plans
        busy = [rank for rank, vote in enumerate(votes) if vote[32:33] == b"B"]
        if busy:
            memory = f"{tools.pool.bytes / 2**30:.2f} GiB on rank 0"
            return {
                "skip": f"the disk is slower than the schedule: rank {busy[0]} has no snapshot memory free ({memory} in use)"
            }
        signatures = [vote[:32].decode() for vote in votes]
        new = signatures != plans.signatures
        if new:
            declared = [unpack(vote[33:]) if len(vote) > 33 else plans.declared[rank] for rank, vote in enumerate(votes)]
            plan = make_plan(declared)
            plans.declared, plans.signatures = declared, signatures
            plans.layouts = [lay_out(d, p) for d, p in zip(declared, plan.pieces, strict=True)]
            plans.arrays = fill_boxes(plan.arrays, plans.layouts)
            for rank, pieces in enumerate(plan.pieces):
                rows = [[piece.source, piece.box.offsets, piece.box.shape] for piece in pieces]
                self.talk.announce(f"pieces/{rank}", json.dumps(rows, separators=(",", ":")).encode())
        self._layouts, self._arrays = plans.layouts, plans.arrays
        token = new_token()
        tools.target.begin(self.step, token)
        self._token = token
        reach("decision.before")
        return {"token": token, "new": new}

    def _own_pieces(self) -> list[tuple[int, list[int], list[int]]]:
        return json.loads(self.talk.hear(f"pieces/{self.talk.control.rank}"))

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

    def _prune(self, tools: Tools) -> list[str]:
        """Retention comes after the commit and can't undo it."""
        try:
            return tools.target.prune(tools.config.keep)
        except OSError as error:
            log.warning("old checkpoints could not be deleted: %s", error)
            return []

    def _give_up(self, tools: Tools) -> None:
        """Tell the others, forget the plan (they may not have got it) and delete what was written."""
        try:
            self.talk.abort(self.report.reason)
        except Exception as error:  # the store is gone: the others' time-outs have to do
            log.warning("the other ranks could not be told: %s", error)
        tools.plans.signature = ""
        tools.plans.signatures = []
        if self.talk.control.rank == 0 and self._token:
            tools.target.discard(self.step, self._token)
