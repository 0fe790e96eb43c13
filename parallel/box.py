"""Box: an axis-aligned region of a global array. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class Box:
    """A half-open, axis-aligned region of a global array: `offsets[d] <= index < offsets[d] + shape[d]`."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        assert len(self.offsets) == len(self.shape), f"offsets {self.offsets} and shape {self.shape} differ in rank"

    @classmethod
    def whole(cls, shape: Iterable[int]) -> Box:
        """Make the box that covers a global array of this shape."""
        extents = tuple(shape)
        return cls((0,) * len(extents), extents)

    @property
    def numel(self) -> int:
        """Number of elements; 1 for a scalar's box `Box((), ())`."""
        count = 1
        for extent in self.shape:
            count *= extent
        return count

    @property
    def ends(self) -> tuple[int, ...]:
        """One past the last index along each dim."""
        return tuple(offset + extent for offset, extent in zip(self.offsets, self.shape, strict=True))

    def intersect(self, other: Box) -> Box | None:
        """Return the common region, or None if it is empty."""
        if self == other and 0 not in self.shape:
            return self
        offsets = tuple(max(a, b) for a, b in zip(self.offsets, other.offsets, strict=True))
        ends = tuple(min(a, b) for a, b in zip(self.ends, other.ends, strict=True))
        if any(end <= offset for offset, end in zip(offsets, ends, strict=True)):
            return None
        return Box(offsets, tuple(end - offset for offset, end in zip(offsets, ends, strict=True)))

    def cut(self, dim: int, start: int, length: int) -> Box:
        """Return the part of this box from its index `start` on along one dim, so long there."""
        offsets, shape = list(self.offsets), list(self.shape)
        offsets[dim], shape[dim] = offsets[dim] + start, length
        return Box(tuple(offsets), tuple(shape))

    def shifted(self, by: tuple[int, ...]) -> Box:
        """Return the box moved by this many indices along each dim."""
        return Box(tuple(offset + step for offset, step in zip(self.offsets, by, strict=True)), self.shape)

    def without(self, other: Box) -> list[Box]:
        """Tile the part of this box that is outside the other: at most two boxes per dim."""
        common = self.intersect(other)
        if common is None:
            return [self]
        parts: list[Box] = []
        offsets, shape = list(self.offsets), list(self.shape)
        for dim, (start, stop) in enumerate(zip(common.offsets, common.ends, strict=True)):
            for first, last in ((offsets[dim], start), (stop, offsets[dim] + shape[dim])):
                if first < last:
                    part_offsets, part_shape = [*offsets], [*shape]
                    part_offsets[dim], part_shape[dim] = first, last - first
                    parts.append(Box(tuple(part_offsets), tuple(part_shape)))
            offsets[dim], shape[dim] = start, stop - start
        return parts

    def slices(self, origin: tuple[int, ...] | None = None) -> tuple[slice, ...]:
        """Return the index of this box in an array whose first element is at `origin` (default: the global array)."""
        origin = origin or (0,) * len(self.shape)
        return tuple(
            slice(offset - start, offset - start + extent)
            for offset, start, extent in zip(self.offsets, origin, self.shape, strict=True)
        )
