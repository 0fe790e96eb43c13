"""The plan in force on this rank, and how all ranks agree that it still holds or on a new one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from ..parallel.box import Box
from ..parallel.fragment import Fragment
from .control import Round
from .digest import text_digest
from .errors import CheckpointError
from .manifest import StoredArray, encode_arrays, prove_coverage
from .plan import Declaration, FileLayout, Piece, declare, fill_boxes, lay_out, make_save_plan, pack, signature, unpack

EMPTY = FileLayout(b"", (), 0)
# What a rank says beside what it holds: nothing is in the way; the disk is still at an earlier save; no memory is free.
FREE, DISK_BUSY, NO_MEMORY = b"F", b"D", b"M"
NO_PLAN = "-" * 32


class Planner:
    """Keeps the plan from save to save. Ranks vote with a digest of what they hold; boxes travel only when it changed.

    A rank also says which plan it has: one that gave up a save before it got that save's plan must not go on with an older one.
    """

    def __init__(self) -> None:
        self.layout = EMPTY
        self._plan = NO_PLAN  # of which `layout` is this rank's share
        self._told = ""  # the signature of the declarations that the coordinator has from this rank
        self._declarations: tuple[Declaration, ...] = ()
        self._identity: list[Any] = []
        self._signature = ""
        # The coordinator's: what every rank declared, the plan made of it, and the files and arrays that follow from that.
        self._declared: dict[int, tuple[str, tuple[Declaration, ...]]] = {}
        self._made = NO_PLAN
        self.layouts: list[FileLayout] = []
        self.arrays: dict[str, StoredArray] = {}
        self.arrays_text = ""

    def vote(self, talk: Round, fragments: Sequence[Fragment], note: bytes) -> None:
        """Tell the coordinator what this rank holds, and what is in the way of another snapshot of it."""
        mine = self._declare(fragments)
        talk.send(
            "vote", mine.encode() + self._plan.encode() + note + (pack(self._declarations) if mine != self._told else b"")
        )
        self._told = mine

    def decide(self, talk: Round) -> tuple[list[bytes], bool]:
        """The coordinator's part: the ranks' notes, and whether there is a new plan (none is made where memory is missing).

        Raises CheckpointError when the ranks' boxes contradict each other or leave a hole.
        """
        votes = talk.gather("vote")
        notes = [vote[64:65] for vote in votes]
        for rank, vote in enumerate(votes):
            if len(vote) > 65:
                self._declared[rank] = vote[:32].decode(), unpack(vote[65:])
            elif rank not in self._declared or self._declared[rank][0] != vote[:32].decode():
                raise CheckpointError(f"rank {rank} holds other arrays than it has told; it will tell them at the next save")
        declared = [self._declared[rank] for rank in range(len(votes))]
        wanted = text_digest("".join(digest for digest, _ in declared).encode())
        if NO_MEMORY in notes or all(plan == wanted for plan in [self._made, *(vote[32:64].decode() for vote in votes)]):
            return notes, False
        if wanted != self._made:
            self._make([declarations for _, declarations in declared])
            self._made = wanted
        for rank, layout in enumerate(self.layouts):
            rows = [[placed.source, placed.box.offsets, placed.box.shape, placed.panels] for placed in layout.placed]
            talk.broadcast(f"pieces/{rank}", json.dumps({"plan": wanted, "pieces": rows}, separators=(",", ":")).encode())
        return notes, True

    def _make(self, declared: list[tuple[Declaration, ...]]) -> None:
        plan = make_save_plan(declared)
        layouts = [lay_out(d, pieces) for d, pieces in zip(declared, plan.pieces, strict=True)]
        arrays = fill_boxes(plan.arrays, layouts)
        prove_coverage(arrays, [layout.bytes for layout in layouts if layout.bytes], "the plan of the save")
        self.layouts, self.arrays, self.arrays_text = layouts, arrays, encode_arrays(arrays)

    def adopt(self, talk: Round) -> None:
        """Take over this rank's share of a new plan."""
        given: dict[str, Any] = json.loads(talk.receive(f"pieces/{talk.control.rank}"))
        pieces = [
            Piece(source, Box(tuple(offsets), tuple(shape)), panels) for source, offsets, shape, panels in given["pieces"]
        ]
        self.layout = lay_out(self._declarations, pieces)
        self._plan = given["plan"]

    def forget(self) -> None:
        """After a failure it is not known who has what: tell everything again, and make the next plan from scratch."""
        self._told = ""
        self._plan = self._made = NO_PLAN

    def _declare(self, fragments: Sequence[Fragment]) -> str:
        identity = [(f.name, f.role, f.global_shape, f.box, f.splits, f.tensor.dtype) for f in fragments]
        if identity != self._identity or not self._signature:
            self._declarations = declare(fragments)
            self._signature = signature(self._declarations)
            self._identity = identity
        return self._signature
