"""The plan of a save: which part of its fragments each rank writes, and where in its file.

Nobody sends it. All ranks know the description of the state (`description.py`), and each derives its own part from it.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from ...parallel.box import Box
from ..digest import LEAF_BYTES
from ..errors import CheckpointError
from ..manifest import FORMAT, VERSION, GlobalArray, StoredArray, encode_arrays, entry_name, entry_shape
from ..stored_file import segment_starts
from .description import Declaration, Description
from .tiling import DEAL_BYTES, Tiling, deal_turns

# A box of at least this size is stored as so many panels of columns, each not narrower than that, so that reading a slice
# of the columns (another tensor-parallel layout) is as sequential as reading a slice of the rows.
PANEL_BOX_BYTES = 256 * 2**10
PANELS = 8
PANEL_ROW_BYTES = 64
# Panels side by side are copied by one call up to this size; a GPU puts them in order in a temporary of its own first.
COPY_BYTES = 32 * 2**20


@dataclass(frozen=True)
class Piece:
    """A box that one rank writes, out of its fragment number `source`, in so many panels."""

    source: int
    box: Box
    panels: int = 1


@dataclass(frozen=True)
class SavePlan:
    """The plan of a save: a pure function of the description of all ranks' state, which each rank derives for itself.

    hosts  of each rank the first one on its host, where these share a file; empty: each rank writes a file of its own
    """

    arrays: dict[str, StoredArray]
    tilings: list[Tiling]
    hosts: dict[int, int] = field(default_factory=dict[int, int])

    @classmethod
    def of(cls, description: Description, least: int = DEAL_BYTES) -> SavePlan:
        """Plan. Raises CheckpointError naming the array of which some element is held by no rank.

        least: bytes of the smallest part in which what several ranks hold is dealt out among them
        """
        tilings: list[Tiling] = []
        first = {entry.cut: entry for entry in reversed(description.entries)}
        for number, holdings in enumerate(description.holdings):
            entry = first[number]
            try:
                tilings.append(Tiling.of(entry.shape, holdings.ranks, holdings.offsets, holdings.shapes, least))
            except ValueError as error:
                raise CheckpointError(f"{entry.key}: {error}") from error
        turns = deal_turns([(tilings[entry.cut], entry.item_bytes) for entry in description.entries])
        arrays = {
            entry.key: StoredArray(entry.name, entry.role, entry.dtype, entry.shape, entry.splits, tiling=entry.cut, turn=turn)
            for entry, turn in zip(description.entries, turns, strict=True)
        }
        return cls(arrays, tilings, _hosts_of(description))

    @functools.cached_property
    def text(self) -> str:
        """The manifest's lines about the arrays, which are the same from save to save."""
        return encode_arrays(self.arrays, self.tilings)

    @property
    def bytes(self) -> int:
        """Size of all arrays in bytes."""
        return sum(array.bytes for array in self.arrays.values())

    def lay_out(self, rank: int, declarations: Sequence[Declaration]) -> FileLayout:
        """Compute what a rank writes of the fragments that it has declared, and where."""
        layout = lay_out(declarations, self.pieces(rank, declarations))
        if not self.hosts or not layout.bytes:
            return layout
        before = [other for other, host in self.hosts.items() if host == self.hosts[rank] and other < rank]
        start = segment_starts([*map(self.file_bytes, before), layout.bytes])[-1]
        return replace(layout, segment=Segment(self.hosts[rank], start))

    def file_bytes(self, rank: int) -> int:
        """Compute the length of what any rank writes, from what it holds."""
        arrays = list(self.arrays.values())
        held = [tiling.held_by(rank) for tiling in self.tilings]
        dealt = [any(copies > 1 for _, copies, _ in regions) for regions in held]
        written: dict[tuple[int, int, int], list[tuple[Box, int]]] = {}  # most arrays are cut, and dealt out, like others
        pieces: list[Piece] = []
        for number, array in enumerate(arrays):
            if not held[array.tiling]:
                continue
            alike = array.tiling, array.item_bytes, array.turn if dealt[array.tiling] else 0
            if alike not in written:
                boxes = self.tilings[array.tiling].written_of(held[array.tiling], array.item_bytes, array.turn)
                written[alike] = [(box, panels_for(box, array.item_bytes)) for box in boxes]
            pieces += [Piece(number, box, panels) for box, panels in written[alike]]
        header, spans = _header_of(arrays, pieces)
        return len(header) + spans[-1].stop if spans else 0

    def pieces(self, rank: int, declarations: Sequence[Declaration]) -> list[Piece]:
        """List what a rank writes of the fragments that it has declared."""
        held: dict[str, list[int]] = {}
        for index, declared in enumerate(declarations):
            held.setdefault(declared.key, []).append(index)
        pieces: list[Piece] = []
        for key, indices in held.items():
            array = self.arrays[key]
            for box in self.tilings[array.tiling].written_by(rank, array.item_bytes, array.turn):
                source = next(index for index in indices if is_inside(box, declarations[index].box))
                pieces.append(Piece(source, box, panels_for(box, array.item_bytes)))
        return pieces


def _hosts_of(description: Description) -> dict[int, int]:
    """Return the first rank on the host of each. Raises CheckpointError where only some ranks say where they are."""
    ranks, hosts = description.hosts.tolist()
    if not ranks:
        return {}
    silent = np.setdiff1d(
        np.concatenate([table.ranks for table in description.holdings] or [np.empty(0, np.int64)]), ranks
    ).tolist()
    if silent:  # the rank of the fewer is told of: it is likelier to be the one that differs
        odd, what = (
            (silent[0], f"not host, as on rank {ranks[0]}")
            if len(silent) <= len(ranks)
            else (ranks[0], f"host, not as on rank {silent[0]}")
        )
        raise CheckpointError(f"rank {odd}: checkpoint.files is {what}; start all with the same")
    first: dict[int, int] = {}
    return {rank: first.setdefault(host, rank) for rank, host in zip(ranks, hosts, strict=True)}


def is_inside(box: Box, outer: Box) -> bool:
    """Return whether a box lies in another."""
    return box == outer or box.intersect(outer) == box


def panels_for(box: Box, item_bytes: int) -> int:
    """Into how many panels of columns a box is best cut."""
    if len(box.shape) < 2 or box.numel * item_bytes < PANEL_BOX_BYTES:
        return 1
    columns = box.shape[-1]
    panels = next(count for count in range(PANELS, 0, -1) if columns % count == 0)
    return panels if columns // panels * item_bytes >= PANEL_ROW_BYTES else 1


@dataclass(frozen=True)
class PlacedPiece:
    """A piece and its bytes `[start, stop)` in the rank's file."""

    source: int
    key: str
    dtype: str
    box: Box
    panels: int
    start: int
    stop: int


@dataclass(frozen=True)
class Copy:
    """One copy into bytes `[start, stop)` of the file: `panels` of a piece, side by side, that make up `box`."""

    source: int
    dtype: str
    box: Box
    panels: int
    start: int
    stop: int


@dataclass(frozen=True)
class Segment:
    """The place of a rank's data in the file of its host: the host's number (its first rank), and the first byte."""

    host: int
    start: int


@dataclass(frozen=True)
class FileLayout:
    """One rank's safetensors file, byte for byte, except the arrays' values. Without pieces there is no file.

    segment  where all of it goes in the file of its host; None: it is a file of its own
    """

    header: bytes
    placed: tuple[PlacedPiece, ...]
    bytes: int
    segment: Segment | None = None

    @functools.cached_property
    def copies(self) -> tuple[Copy, ...]:
        """The copies that fill the file: piece by piece, and large ones panel by panel."""
        return tuple(copy for piece in self.placed for copy in _copies_of(piece))


NO_FILE = FileLayout(b"", (), 0)
NOTHING = SavePlan({}, [])


def _copies_of(piece: PlacedPiece) -> Iterator[Copy]:
    if piece.panels == 1:
        yield Copy(piece.source, piece.dtype, piece.box, 1, piece.start, piece.stop)
        return
    panel_bytes = (piece.stop - piece.start) // piece.panels
    width = piece.box.shape[-1] // piece.panels
    together = min(piece.panels, max(1, COPY_BYTES // panel_bytes))
    for first in range(0, piece.panels, together):
        count = min(together, piece.panels - first)
        box = piece.box.cut(-1, first * width, count * width)
        start = piece.start + first * panel_bytes
        yield Copy(piece.source, piece.dtype, box, count, start, start + count * panel_bytes)


def lay_out(declarations: Sequence[GlobalArray], pieces: Sequence[Piece]) -> FileLayout:
    """Compute the offset of each piece in its rank's file.

    Pieces of whole leaves come first, so that reading one reads no leaf of another; then wider types before narrower ones,
    so that every array is aligned to its elements without a hole, which safetensors forbids. The header is padded with
    spaces to whole leaves, so that the data start on a page.
    """
    header, spans = _header_of(declarations, pieces)
    if not spans:
        return NO_FILE
    first = len(header)
    placed = tuple(
        PlacedPiece(piece.source, d.key, d.dtype, piece.box, piece.panels, first + start, first + stop)
        for piece, d, start, stop in spans
    )
    return FileLayout(header, placed, first + spans[-1].stop)


class _Span(NamedTuple):
    """A piece of an array, and its bytes behind the header."""

    piece: Piece
    array: GlobalArray
    start: int
    stop: int


def _header_of(declarations: Sequence[GlobalArray], pieces: Sequence[Piece]) -> tuple[bytes, list[_Span]]:
    """Make the header of a rank's file, and put the pieces in order behind it."""

    def position(piece: Piece) -> tuple[bool, int, str, tuple[int, ...], tuple[int, ...]]:
        declaration = declarations[piece.source]
        odd = piece.box.numel * declaration.item_bytes % LEAF_BYTES != 0
        return odd, -declaration.item_bytes, declaration.key, piece.box.offsets, piece.box.shape

    order = sorted(pieces, key=position)
    entries: dict[str, object] = {"__metadata__": {"format": "pt", "written_by": f"{FORMAT} version {VERSION}"}}
    spans: list[_Span] = []
    at = 0
    for piece in order:
        declaration = declarations[piece.source]
        size = piece.box.numel * declaration.item_bytes
        entries[entry_name(declaration.key, piece.box)] = {
            "dtype": declaration.dtype,
            "shape": entry_shape(piece.box, piece.panels),
            "data_offsets": (at, at + size),
        }
        spans.append(_Span(piece, declaration, at, at + size))
        at += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    length = -(-(8 + len(text)) // LEAF_BYTES) * LEAF_BYTES - 8
    return length.to_bytes(8, "little") + text.ljust(length), spans
