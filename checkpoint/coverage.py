"""Proof that boxes tile an array: each element lies in exactly one box."""

from __future__ import annotations

from collections.abc import Sequence

from ..parallel.box import Box


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
    pair = _overlap(boxes)
    if pair is not None:
        return f"boxes {describe(pair[0])} and {describe(pair[1])} overlap"
    covered = sum(box.numel for box in boxes)
    if covered != volume:
        return f"{volume - covered} of {volume} elements are in no box"
    return None


def describe(box: Box) -> str:
    """A box the way an index expression writes it: [0:4, 8:16]."""
    return "[" + ", ".join(f"{o}:{o + n}" for o, n in zip(box.offsets, box.shape, strict=True)) + "]"


def _overlap(boxes: Sequence[Box]) -> tuple[Box, Box] | None:
    if len(boxes) < 2:
        return None
    dims = len(boxes[0].shape)
    if dims == 0:
        return boxes[0], boxes[1]
    along = max(range(dims), key=lambda dim: len({box.offsets[dim] for box in boxes}))
    active: list[Box] = []
    for box in sorted(boxes, key=lambda box: box.offsets[along]):
        start = box.offsets[along]
        active = [other for other in active if other.ends[along] > start]
        for other in active:
            if box.intersect(other) is not None:
                return other, box
        active.append(box)
    return None
