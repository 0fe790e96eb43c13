"""The plan in force on this rank, and how all ranks agree that it still holds or on a new one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from ..parallel.fragment import Box, Fragment
from .control import Round
from .manifest import StoredArray, encode_arrays, prove_coverage
from .plan import Declaration, FileLayout, Piece, declare, fill_boxes, lay_out, make_plan, pack, signature, unpack

EMPTY = FileLayout(b"", (), 0)
# What a rank says beside what it holds: nothing is in the way; the disk is still at an earlier save; no memory is free.
FREE, DISK_BUSY, NO_MEMORY = b"F", b"D", b"M"


class Planner:
    """Keeps the plan from save to save. Ranks vote with a digest of what they hold; boxes travel only when it changed."""

    def __init__(self) -> None:
        self.layout = EMPTY
        self._signature = ""
        self._declarations: tuple[Declaration, ...] = ()
        self._identity: list[Any] = []
        self._declared_signature = ""
        # The coordinator's: what every rank declared, and the files and arrays that follow from it.
        self._declared: list[tuple[Declaration, ...]] = []
        self._signatures: list[str] = []
        self.layouts: list[FileLayout] = []
        self.arrays: dict[str, StoredArray] = {}
        self.arrays_text = ""

    def vote(self, talk: Round, fragments: Sequence[Fragment], note: bytes) -> None:
        """Tell the coordinator what this rank holds, and what is in the way of another snapshot of it."""
        mine = self._declare(fragments)
        changed = mine != self._signature
        talk.post("vote", mine.encode() + note + (pack(self._declarations) if changed else b""))

    def decide(self, talk: Round) -> tuple[list[bytes], bool]:
        """The coordinator's part: the ranks' notes, and whether there is a new plan (none is made where memory is missing).

        Raises CheckpointError when the ranks' boxes contradict each other or leave a hole.
        """
        votes = talk.collect("vote")
        notes = [vote[32:33] for vote in votes]
        signatures = [vote[:32].decode() for vote in votes]
        if NO_MEMORY in notes or signatures == self._signatures:
            return notes, False
        declared = [unpack(vote[33:]) if len(vote) > 33 else self._declared[rank] for rank, vote in enumerate(votes)]
        plan = make_plan(declared)
        layouts = [lay_out(d, pieces) for d, pieces in zip(declared, plan.pieces, strict=True)]
        arrays = fill_boxes(plan.arrays, layouts)
        prove_coverage(arrays, [layout.bytes for layout in layouts if layout.bytes], "the plan of the save")
        self._declared, self._signatures = declared, signatures
        self.layouts, self.arrays, self.arrays_text = layouts, arrays, encode_arrays(arrays)
        for rank, pieces in enumerate(plan.pieces):
            rows = [[piece.source, piece.box.offsets, piece.box.shape, piece.panels] for piece in pieces]
            talk.announce(f"pieces/{rank}", json.dumps(rows, separators=(",", ":")).encode())
        return notes, True

    def adopt(self, talk: Round) -> None:
        """Take over this rank's share of a new plan."""
        rows: list[Any] = json.loads(talk.hear(f"pieces/{talk.control.rank}"))
        pieces = [Piece(source, Box(tuple(offsets), tuple(shape)), panels) for source, offsets, shape, panels in rows]
        self.layout = lay_out(self._declarations, pieces)
        self._signature = self._declared_signature

    def forget(self) -> None:
        """After a failure the other ranks may not have the plan: make the next one from scratch."""
        self._signature = ""
        self._signatures = []

    def _declare(self, fragments: Sequence[Fragment]) -> str:
        identity = [(f.name, f.role, f.global_shape, f.box, f.splits, f.tensor.dtype) for f in fragments]
        if identity != self._identity or not self._declared_signature:
            self._declarations = declare(fragments)
            self._declared_signature = signature(self._declarations)
            self._identity = identity
        return self._declared_signature
