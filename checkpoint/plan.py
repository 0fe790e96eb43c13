"""The plan of a save: ranks declare the boxes they hold, and each element of each array is given to exactly one of them.

The plan depends on the declarations alone, so it is made once and kept until some rank's declaration changes.
"""

from __future__ import annotations

import functools
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from ..parallel.box import Box
from ..parallel.fragment import Fragment
from .coverage import describe, tiling_fault
from .digest import LEAF_BYTES, text_digest
from .dtypes import name_of
from .errors import CheckpointError
from .manifest import FORMAT, ITEM_BYTES, VERSION, StoredArray, StoredBox, entry_shape

# A box that several ranks hold is dealt out among them in pieces of about this size, so that the shares come out even.
DEAL_BYTES = 32 * 2**20
# A box of at least this size is stored as so many panels of columns, each not narrower than that, so that reading a slice
# of the columns (another tensor-parallel layout) is as sequential as reading a slice of the rows.
PANEL_BOX_BYTES = 256 * 2**10
PANELS = 8
PANEL_ROW_BYTES = 64
# Panels side by side are copied by one call up to this size; a GPU puts them in order in a temporary of its own first.
COPY_BYTES = 32 * 2**20


@dataclass(frozen=True)
class Declaration:
    """A rank's description of one of its fragments."""

    name: str
    role: str
    dtype: str
    shape: tuple[int, ...]
    splits: tuple[int, ...]
    box: Box

    @property
    def key(self) -> str:
        """Name of the global array in the checkpoint."""
        return f"{self.role}/{self.name}"

    @property
    def item_bytes(self) -> int:
        """Size of one element in bytes."""
        return ITEM_BYTES[self.dtype]


def declare(fragments: Iterable[Fragment]) -> tuple[Declaration, ...]:
    """The declarations of a rank's fragments, in their order. Raises CheckpointError for a type that can't be stored."""
    declared: list[Declaration] = []
    for fragment in fragments:
        try:
            dtype = name_of(fragment.tensor.dtype)
        except ValueError as error:
            raise CheckpointError(f"{fragment.key}: {error}") from error
        shape = tuple(fragment.global_shape)
        declared.append(Declaration(fragment.name, fragment.role, dtype, shape, tuple(fragment.splits), fragment.box))
    return tuple(declared)


def pack(declarations: Sequence[Declaration]) -> bytes:
    """Declarations as a message."""
    rows = [[d.name, d.role, d.dtype, d.shape, d.splits, d.box.offsets, d.box.shape] for d in declarations]
    return zlib.compress(json.dumps(rows, separators=(",", ":")).encode(), 1)


def unpack(message: bytes) -> tuple[Declaration, ...]:
    """The declarations in a message."""
    return tuple(
        Declaration(name, role, dtype, tuple(shape), tuple(splits), Box(tuple(offsets), tuple(extent)))
        for name, role, dtype, shape, splits, offsets, extent in json.loads(zlib.decompress(message))
    )


def signature(declarations: Sequence[Declaration]) -> str:
    """A digest that changes with anything in the declarations."""
    return text_digest(repr(declarations).encode())


@dataclass(frozen=True)
class Piece:
    """A box that one rank writes, out of its fragment number `source`, in so many panels."""

    source: int
    box: Box
    panels: int = 1


@dataclass(frozen=True)
class SavePlan:
    """The arrays of a checkpoint (without boxes) and, for each rank, the pieces it writes."""

    arrays: dict[str, StoredArray]
    pieces: list[list[Piece]]


def make_save_plan(declared: Sequence[Sequence[Declaration]]) -> SavePlan:
    """Assign every element of every array to one rank that holds it.

    Raises CheckpointError naming the array when the ranks contradict each other or some element is held by none.
    """
    arrays: dict[str, StoredArray] = {}
    holders: dict[tuple[str, Box], list[tuple[int, int]]] = {}
    first: dict[str, int] = {}
    for rank, declarations in enumerate(declared):
        for index, d in enumerate(declarations):
            known = arrays.setdefault(d.key, StoredArray(d.name, d.role, d.dtype, d.shape, d.splits))
            if (known.dtype, known.shape, known.splits) != (d.dtype, d.shape, d.splits):
                raise CheckpointError(
                    f"{d.key}: rank {rank} holds it as {d.dtype}{list(d.shape)}, rank {first[d.key]} as "
                    f"{known.dtype}{list(known.shape)}; one array has one shape, type and set of split points on all ranks"
                )
            first.setdefault(d.key, rank)
            holders.setdefault((d.key, d.box), []).append((rank, index))
    pieces: list[list[Piece]] = [[] for _ in declared]
    load = [0] * len(declared)
    shared: list[tuple[int, str, Box, list[tuple[int, int]]]] = []
    for key, held, box in _choose(arrays, holders):
        who = holders[key, held]
        item = arrays[key].item_bytes
        if len(who) == 1:
            rank, index = who[0]
            pieces[rank].append(Piece(index, box))
            load[rank] += box.numel * item
        else:
            shared += [(part.numel * item, key, part, who) for part in cut_rows(box, item, DEAL_BYTES)]
    for size, _, part, who in sorted(shared, key=lambda entry: (-entry[0], entry[1], entry[2])):
        rank, index = min(who, key=lambda holder: load[holder[0]])
        pieces[rank].append(Piece(index, part))
        load[rank] += size
    for rank, mine in enumerate(pieces):
        pieces[rank] = [Piece(p.source, p.box, panels_for(p.box, declared[rank][p.source].item_bytes)) for p in mine]
    return SavePlan(arrays, pieces)


def _choose(
    arrays: dict[str, StoredArray], holders: dict[tuple[str, Box], list[tuple[int, int]]]
) -> list[tuple[str, Box, Box]]:
    """For each array, boxes that tile it, each inside a box that is held: (key, held box, the part of it that is taken).

    All boxes are taken whole unless some overlap (blocks that lie across a cut are held on both sides of it). Then the
    largest are taken first, and of the others what is left of them.
    """
    held: dict[str, list[Box]] = {key: [] for key in arrays}
    for key, box in holders:
        held[key].append(box)
    chosen: list[tuple[str, Box, Box]] = []
    for key, boxes in held.items():
        taken = [(box, box) for box in sorted(boxes)]
        if tiling_fault(arrays[key].shape, boxes) is not None:
            taken = []
            for box in sorted(boxes, key=lambda box: (-box.numel, box)):
                rest = [box]
                for _, other in taken:
                    rest = [part for piece in rest for part in piece.without(other)]
                taken += [(box, part) for part in rest]
            fault = tiling_fault(arrays[key].shape, [part for _, part in taken])
            if fault is not None:
                shown = ", ".join(describe(box) for box in boxes[:8])
                raise CheckpointError(f"{key}: the boxes that the ranks hold ({shown}) don't make up the array: {fault}")
        chosen += [(key, box, part) for box, part in taken]
    return chosen


def cut_rows(box: Box, item_bytes: int, limit: int) -> list[Box]:
    """Cut a box along its first dim that is longer than one, into pieces of at most about `limit` bytes."""
    dim = next((dim for dim, extent in enumerate(box.shape) if extent > 1), None)
    if dim is None or box.numel * item_bytes <= limit:
        return [box]
    rows = max(1, limit * box.shape[dim] // (box.numel * item_bytes))
    return [_part(box, dim, at, min(rows, box.shape[dim] - at)) for at in range(0, box.shape[dim], rows)]


def panels_for(box: Box, item_bytes: int) -> int:
    """Into how many panels of columns a box is best cut."""
    if len(box.shape) < 2 or box.numel * item_bytes < PANEL_BOX_BYTES:
        return 1
    columns = box.shape[-1]
    panels = next(count for count in range(PANELS, 0, -1) if columns % count == 0)
    return panels if columns // panels * item_bytes >= PANEL_ROW_BYTES else 1


def _part(box: Box, dim: int, at: int, length: int) -> Box:
    offsets, shape = list(box.offsets), list(box.shape)
    offsets[dim] += at
    shape[dim] = length
    return Box(tuple(offsets), tuple(shape))


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
class FileLayout:
    """One rank's safetensors file, byte for byte, except the arrays' values. Without pieces there is no file."""

    header: bytes
    placed: tuple[PlacedPiece, ...]
    bytes: int

    @functools.cached_property
    def copies(self) -> tuple[Copy, ...]:
        """The copies that fill the file: piece by piece, and large ones panel by panel."""
        return tuple(copy for piece in self.placed for copy in _copies_of(piece))


def _copies_of(piece: PlacedPiece) -> Iterator[Copy]:
    if piece.panels == 1:
        yield Copy(piece.source, piece.dtype, piece.box, 1, piece.start, piece.stop)
        return
    panel_bytes = (piece.stop - piece.start) // piece.panels
    width = piece.box.shape[-1] // piece.panels
    together = min(piece.panels, max(1, COPY_BYTES // panel_bytes))
    for first in range(0, piece.panels, together):
        count = min(together, piece.panels - first)
        box = _part(piece.box, len(piece.box.shape) - 1, first * width, count * width)
        start = piece.start + first * panel_bytes
        yield Copy(piece.source, piece.dtype, box, count, start, start + count * panel_bytes)


def lay_out(declarations: Sequence[Declaration], pieces: Sequence[Piece]) -> FileLayout:
    """Compute the offset of each piece in its rank's file.

    Pieces of whole leaves come first, so that reading one reads no leaf of another; then wider types before narrower ones,
    so that every array is aligned to its elements without a hole, which safetensors forbids. The header is padded with
    spaces to whole leaves, so that the data start on a page.
    """

    def position(piece: Piece) -> tuple[bool, int, str, tuple[int, ...], tuple[int, ...]]:
        declaration = declarations[piece.source]
        odd = piece.box.numel * declaration.item_bytes % LEAF_BYTES != 0
        return odd, -declaration.item_bytes, declaration.key, piece.box.offsets, piece.box.shape

    order = sorted(pieces, key=position)
    entries: dict[str, object] = {"__metadata__": {"format": "pt", "written_by": f"{FORMAT} version {VERSION}"}}
    spans: list[tuple[Piece, Declaration, int, int]] = []
    at = 0
    for piece in order:
        declaration = declarations[piece.source]
        size = piece.box.numel * declaration.item_bytes
        entries[f"{declaration.key}@{','.join(map(str, piece.box.offsets))}"] = {
            "dtype": declaration.dtype,
            "shape": entry_shape(piece.box, piece.panels),
            "data_offsets": (at, at + size),
        }
        spans.append((piece, declaration, at, at + size))
        at += size
    if not spans:
        return FileLayout(b"", (), 0)
    text = json.dumps(entries, separators=(",", ":")).encode()
    length = -(-(8 + len(text)) // LEAF_BYTES) * LEAF_BYTES - 8
    header = length.to_bytes(8, "little") + text.ljust(length)
    placed = tuple(
        PlacedPiece(piece.source, d.key, d.dtype, piece.box, piece.panels, len(header) + start, len(header) + stop)
        for piece, d, start, stop in spans
    )
    return FileLayout(header, placed, len(header) + at)


def fill_boxes(arrays: dict[str, StoredArray], layouts: Sequence[FileLayout]) -> dict[str, StoredArray]:
    """The arrays with their boxes; ranks without a file don't count in the numbering of files."""
    filled = {key: StoredArray(a.name, a.role, a.dtype, a.shape, a.splits) for key, a in arrays.items()}
    number = 0
    for layout in layouts:
        for placed in layout.placed:
            filled[placed.key].boxes.append(StoredBox(placed.box, number, placed.start, placed.stop, placed.panels))
        number += bool(layout.placed)
    for array in filled.values():
        array.boxes.sort(key=lambda stored: stored.box)
    return filled
