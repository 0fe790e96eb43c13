"""Proof that boxes tile an array: each element lies in exactly one box."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from ...parallel.box import Box


def tiling_fault(shape: tuple[int, ...], boxes: Sequence[Box]) -> str | None:
    """Return why `boxes` do not tile an array of this shape, or None when they do.

    Boxes inside the array, pairwise disjoint, whose volumes add up to the array's, tile it. Disjointness is checked by a
    sweep along the dim with the most distinct starts, so that the usual grids cost n log n.
    """
    volume = Box.whole(shape).numel
    for box in boxes:
        if len(box.shape) != len(shape):
            return f"box {describe(box)} has {len(box.shape)} dims, the array has {len(shape)}"
        if any(o < 0 or n <= 0 or o + n > s for o, n, s in zip(box.offsets, box.shape, shape, strict=True)):
            return f"box {describe(box)} reaches outside of shape {list(shape)}"
    pair = next(overlaps(boxes), None)
    if pair is not None:
        return f"boxes {describe(boxes[pair[0]])} and {describe(boxes[pair[1]])} overlap"
    covered = sum(box.numel for box in boxes)
    if covered != volume:
        return f"{volume - covered} of {volume} elements are in no box"
    return None


def describe(box: Box) -> str:
    """A box the way an index expression writes it: [0:4, 8:16]."""
    return "[" + ", ".join(f"{o}:{o + n}" for o, n in zip(box.offsets, box.shape, strict=True)) + "]"


def overlaps(boxes: Sequence[Box]) -> Iterator[tuple[int, int]]:
    """Yield the pairs of boxes, by number, that have elements in common."""
    if len(boxes) < 2:
        return
    dims = len(boxes[0].shape)
    if dims == 0:
        yield from itertools.combinations(range(len(boxes)), 2)
        return
    along = max(range(dims), key=lambda dim: len({box.offsets[dim] for box in boxes}))
    active: list[int] = []
    for number in sorted(range(len(boxes)), key=lambda number: boxes[number].offsets[along]):
        box = boxes[number]
        start = box.offsets[along]
        active = [other for other in active if boxes[other].ends[along] > start]
        for other in active:
            if box.intersect(boxes[other]) is not None:
                yield other, number
        active.append(number)
