"""Tiling: how an array is cut over the ranks that hold it, and which of them writes what. Arithmetic alone, without PyTorch.

A save's plan and the reader of a checkpoint derive from it where each element is, so nobody has to send or store a list.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ...parallel.box import Box
from .columns import Integers, columns_of, pack, pack_boxes, unpack, unpack_boxes
from .coverage import describe, overlaps, tiling_fault

DEAL_BYTES = 2**20
"""A region that several ranks hold is dealt out among them in parts of at least about this size."""


@dataclass(frozen=True)
class Tiling:
    """Disjoint regions that make up an array, each with the ranks that hold it: all arrays that are cut alike have one tiling.

    offsets  (regions, dims) where each begins, in lexicographic order; shapes: (regions, dims) its extents
    owners   ranks that hold a region, ascending: region i's are `owners[starts[i]:starts[i + 1]]`
    least    bytes of the smallest part that a region is dealt out in
    """

    offsets: Integers
    shapes: Integers
    starts: Integers
    owners: Integers
    least: int = DEAL_BYTES

    @classmethod
    def of(cls, shape: Sequence[int], ranks: Integers, offsets: Integers, shapes: Integers, least: int = DEAL_BYTES) -> Tiling:
        """Tile an array with the boxes that ranks hold: row i says that `ranks[i]` holds the box at `offsets[i]`.

        Raises ValueError where they leave a hole or reach outside.
        """
        dims = offsets.shape[1]
        order = np.lexsort((ranks, *(column for dim in reversed(range(dims)) for column in (shapes[:, dim], offsets[:, dim]))))
        ranks, offsets, shapes = ranks[order], offsets[order], shapes[order]
        first = np.ones(len(ranks), bool)
        first[1:] = (offsets[1:] != offsets[:-1]).any(1) | (shapes[1:] != shapes[:-1]).any(1)
        starts = np.append(np.flatnonzero(first), len(ranks))
        tiling = cls(offsets[first], shapes[first], starts, ranks, least)
        fault = tiling.fault(shape)
        if fault is not None:
            tiling = replace(tiling._refined(shape), least=least)
            fault = tiling.fault(shape)
        if fault is not None:
            shown = ", ".join(describe(tiling.region(number)) for number in range(min(8, len(tiling))))
            raise ValueError(f"the boxes that the ranks hold ({shown}) don't make up the array: {fault}")
        return tiling

    def __len__(self) -> int:
        """Return the number of regions."""
        return len(self.offsets)

    def region(self, number: int) -> Box:
        """Return a region as a box."""
        return Box(tuple(self.offsets[number].tolist()), tuple(self.shapes[number].tolist()))

    def copies(self, number: int) -> int:
        """Return how many ranks hold a region."""
        return int(self.starts[number + 1] - self.starts[number])

    def fault(self, shape: Sequence[int]) -> str | None:
        """Return why the regions do not tile an array of this shape, or None when they do."""
        if self.offsets.shape[1] != len(shape) or (np.diff(self.starts) < 1).any():
            return f"regions of {self.offsets.shape[1]} dims, each held by some rank, can't make up shape {list(shape)}"
        if _is_nested(shape, self.offsets, self.shapes):
            return None
        return tiling_fault(tuple(shape), [self.region(number) for number in range(len(self))])

    def held_by(self, rank: int) -> list[tuple[Box, int, int]]:
        """List the regions that a rank holds, each with the number of copies and which of them this rank's is."""
        found: list[tuple[Box, int, int]] = []
        order, owners = self._by_owner
        low, high = np.searchsorted(owners, [rank, rank + 1]).tolist()
        for at in order[low:high].tolist():
            number = int(np.searchsorted(self.starts, at, "right")) - 1
            found.append((self.region(number), self.copies(number), at - int(self.starts[number])))
        return found

    @functools.cached_property
    def _by_owner(self) -> tuple[Integers, Integers]:
        """The order of `owners` by rank, and they in it."""
        order = np.argsort(self.owners, kind="stable")
        return order, self.owners[order]

    def written_by(self, rank: int, item_bytes: int, turn: int) -> Iterator[Box]:
        """Yield the parts of an array of this tiling that a rank writes. turn: the array's (`written_part`)"""
        return self.written_of(self.held_by(rank), item_bytes, turn)

    def written_of(self, held: Sequence[tuple[Box, int, int]], item_bytes: int, turn: int) -> Iterator[Box]:
        """Yield as `written_by` does, of the regions that `held_by` has listed."""
        for region, copies, copy in held:
            part = written_part(region, parts_of(region, item_bytes, copies, self.least), copies, copy, turn)
            if part is not None:
                yield part

    def parts(self, item_bytes: int, turn: int, box: Box | None = None) -> Iterator[tuple[int, Box]]:
        """Yield the parts that an array of this tiling is stored in, with the rank that writes each.

        turn: the array's (`written_part`). box: only parts that have something in common with it
        """
        chosen = range(len(self))
        if box is not None and box.shape:
            low, high = np.array(box.offsets), np.array(box.ends)
            chosen = np.flatnonzero(((self.offsets < high) & (self.offsets + self.shapes > low)).all(1)).tolist()
        for number in chosen:
            region, copies = self.region(number), self.copies(number)
            count = parts_of(region, item_bytes, copies, self.least)
            owners = self.owners[self.starts[number] : self.starts[number + 1]]
            for index in range(count):
                part = cut_part(region, index, count)
                if box is None or not box.shape or part.intersect(box) is not None:
                    yield int(owners[(index + turn) % copies]), part

    def count_parts(self, item_bytes: int) -> int:
        """Return the number of parts that an array of this tiling is stored in."""
        return sum(parts_of(self.region(number), item_bytes, self.copies(number), self.least) for number in range(len(self)))

    def _refined(self, shape: Sequence[int]) -> Tiling:
        """Regions out of boxes that overlap, such as blocks that lie across a cut and are held on both sides of it."""
        cut = [dim for dim, size in enumerate(shape) if self.offsets[:, dim].any() or (self.shapes[:, dim] != size).any()]
        if len(cut) == 1:
            return self._refined_along(cut[0])
        boxes = [self.region(number) for number in range(len(self))]
        rivals: dict[int, list[int]] = {}
        for one, other in overlaps(boxes):
            rivals.setdefault(one, []).append(other)
            rivals.setdefault(other, []).append(one)
        done: dict[int, list[Box]] = {}
        for number in sorted(range(len(boxes)), key=lambda at: (-boxes[at].numel, at)):  # the largest have the first choice
            rest = [boxes[number]]
            for rival in rivals.get(number, ()):
                for other in done.get(rival, ()):
                    rest = [part for piece in rest for part in piece.without(other)]
            done[number] = rest
        taken = sorted(((number, part) for number, parts in done.items() for part in parts), key=lambda entry: entry[1])
        owners = [self.owners[self.starts[number] : self.starts[number + 1]] for number, _ in taken]
        return _assemble([box for _, box in taken], owners)

    def _refined_along(self, dim: int) -> Tiling:
        """The same where all boxes are cut along one dim: every span between two edges, held by all whose boxes have it."""
        begin, end = self.offsets[:, dim], self.offsets[:, dim] + self.shapes[:, dim]
        edges = np.unique(np.concatenate([begin, end]))
        owners: list[list[Integers]] = [[] for _ in edges[1:]]
        for number, (low, high) in enumerate(zip(np.searchsorted(edges, begin), np.searchsorted(edges, end), strict=True)):
            for span in range(int(low), int(high)):
                owners[span].append(self.owners[self.starts[number] : self.starts[number + 1]])
        begins = (edges[:-1] - begin[0]).tolist()
        spans = [self.region(0).cut(dim, *span) for span in zip(begins, np.diff(edges).tolist(), strict=True)]
        held = [number for number, each in enumerate(owners) if each]
        return _assemble([spans[number] for number in held], [np.unique(np.concatenate(owners[number])) for number in held])


def _assemble(boxes: Sequence[Box], owners: Sequence[Integers]) -> Tiling:
    return Tiling(*columns_of(boxes), np.cumsum([0, *map(len, owners)]), np.concatenate(owners))


def undealt(boxes: Sequence[Box], owners: Sequence[int]) -> Tiling:
    """Make a tiling of boxes, in their order, each of which one rank holds and writes."""
    return _assemble(boxes, [np.array([owner], np.int64) for owner in owners])


def _is_nested(shape: Sequence[int], offsets: Integers, shapes: Integers) -> bool:
    """Return whether regions tile an array as nested cuts do: along dim 0, then each slab along dim 1, and so on.

    All cuts over meshes, and flat pieces, are such, in any mixture. offsets, shapes: (regions, dims) in lexicographic order.
    """
    count = len(offsets)
    begins = np.zeros(count, bool)  # the first region of a slab
    begins[:1] = True
    for dim, extent in enumerate(shape):
        offset, length = offsets[:, dim], shapes[:, dim]
        fresh = begins.copy()
        fresh[1:] |= (offset[1:] != offset[:-1]) | (length[1:] != length[:-1])
        ends = np.roll(begins, -1)  # the last region of a slab
        previous_end = np.roll(offset + length, 1)
        starts_right = np.where(begins, offset == 0, offset == previous_end)
        if (length < 1).any() or not starts_right[fresh].all() or not (offset + length == extent)[ends].all():
            return False
        begins = fresh
    return bool(count and begins.all())


def parts_of(region: Box, item_bytes: int, copies: int, least: int) -> int:
    """Return into how many parts, of about `least` bytes or more, a region is cut; each is written by another holder."""
    if copies == 1:
        return 1
    rows = next((extent for extent in region.shape if extent > 1), 1)
    return min(copies, rows, max(1, region.numel * item_bytes // least))


def cut_part(region: Box, index: int, count: int) -> Box:
    """Return one of so many nearly equal parts of a region, cut along its first dim that is longer than one."""
    if count == 1:
        return region
    dim = next(dim for dim, extent in enumerate(region.shape) if extent > 1)
    low, high = (region.shape[dim] * at // count for at in (index, index + 1))
    return region.cut(dim, low, high - low)


def written_part(region: Box, count: int, copies: int, copy: int, turn: int) -> Box | None:
    """Return the one of `count` parts of a region that the holder of a copy writes; None: others write it.

    Part i is written by copy (i + turn) mod copies: `turn` is the array's, so that small arrays don't all fall to the first.
    """
    index = (copy - turn) % copies
    return cut_part(region, index, count) if index < count else None


def deal_turns(arrays: Sequence[tuple[Tiling, int]]) -> list[int]:
    """Choose each array's turn: the largest first, each to the least loaded copies. arrays: with the bytes of an element"""
    largest: dict[int, tuple[int, Box, int]] = {}  # of each tiling its largest region, in elements, and that one's copies
    for tiling, _ in arrays:
        if id(tiling) not in largest:
            number = int(tiling.shapes.prod(1).argmax())
            region = tiling.region(number)
            largest[id(tiling)] = region.numel, region, tiling.copies(number)
    sizes = [largest[id(tiling)][0] * item for tiling, item in arrays]
    turns = [0] * len(arrays)
    loads: dict[int, Integers] = {}
    for number in sorted(range(len(arrays)), key=lambda at: (-sizes[at], at)):
        tiling, item = arrays[number]
        _, region, copies = largest[id(tiling)]
        count = parts_of(region, item, copies, tiling.least)
        if count == copies:
            continue
        load = loads.setdefault(copies, np.zeros(copies, np.int64))
        turns[number] = int(load.argmin())
        load[(turns[number] + np.arange(count)) % copies] += sizes[number] // count
    return turns


def encode_tilings(tilings: Sequence[Tiling]) -> dict[str, object]:
    """Tilings as plain JSON (docs/checkpoint.md)."""
    return {
        "least": [tiling.least for tiling in tilings],
        "regions": [len(tiling) for tiling in tilings],
        "dims": [tiling.offsets.shape[1] for tiling in tilings],
        "boxes": pack_boxes([(tiling.offsets, tiling.shapes) for tiling in tilings]) if tilings else "",
        "copies": pack(np.concatenate([np.diff(tiling.starts) for tiling in tilings])) if tilings else "",
        "owners": pack(np.concatenate([tiling.owners for tiling in tilings])) if tilings else "",
    }


def decode_tilings(content: dict[str, object]) -> list[Tiling]:
    """Decode what `encode_tilings` gave. Raises ValueError for anything else."""
    counts, dims, parts = (content[name] for name in ("regions", "dims", "least"))
    if not counts:
        return []
    assert isinstance(counts, list) and isinstance(dims, list) and isinstance(parts, list)
    copies, owners = (unpack(str(content[name])) for name in ("copies", "owners"))
    tilings: list[Tiling] = []
    row = owner = 0
    for (offsets, shapes), least in zip(unpack_boxes(str(content["boxes"]), counts, dims), parts, strict=True):
        starts = np.concatenate([[0], np.cumsum(copies[row : row + len(offsets)])])
        tilings.append(Tiling(offsets, shapes, starts, owners[owner : owner + int(starts[-1])], least))
        row, owner = row + len(offsets), owner + int(starts[-1])
    return tilings
