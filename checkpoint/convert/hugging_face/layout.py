"""The places of our weights' boxes in tensors of the files, and the other way round. Imports no torch at run time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ....models.families import StoredPart, StoredWeights
from ....parallel.box import Box

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class PlacedPart:
    """A part of one of our weights. box: its rows in the weight"""

    ours: str
    box: Box
    part: StoredPart

    @property
    def end(self) -> int:
        """The row of the tensor after its last."""
        return self.part.rows[1] if self.part.rows else self.box.shape[0]

    def region(self, wanted: Box) -> Box:
        """Return the region of the tensor that holds a box of our weight. Between rows of a `step` it holds others, too."""
        first = self.part.rows[0] if self.part.rows else 0
        first += (wanted.offsets[0] - self.box.offsets[0]) * self.part.step
        offsets, shape = (first, *wanted.offsets[1:]), ((wanted.shape[0] - 1) * self.part.step + 1, *wanted.shape[1:])
        if self.part.transposed:
            offsets, shape = offsets[::-1], shape[::-1]
        return Box((*self.part.index, *offsets), (*(1 for _ in self.part.index), *shape))

    def box_of(self, region: Box) -> Box:
        """Return the box of our weight that a region of the tensor holds. For plain parts only."""
        assert self.part.is_plain, "rows in another order have no such box"
        leading = len(self.part.index)
        first = self.part.rows[0] if self.part.rows else 0
        offsets = region.offsets[leading:]
        return Box((offsets[0] - first + self.box.offsets[0], *offsets[1:]), region.shape[leading:])

    def arrange(self, values: torch.Tensor) -> torch.Tensor:
        """Return the values of a region as our weight has them: a view."""
        values = values[(0,) * len(self.part.index)]
        return (values.T if self.part.transposed else values)[:: self.part.step]

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the view of a whole tensor of the files that is this part."""
        tensor = tensor[self.part.index]
        first = self.part.rows[0] if self.part.rows else 0
        return (tensor.T if self.part.transposed else tensor)[first : self.end : self.part.step]


def place_parts(weights: StoredWeights, shapes: Mapping[str, tuple[int, ...]]) -> list[PlacedPart]:
    """Return the parts of all weights, in their order. shapes: our name → shape"""
    assert weights.keys() == shapes.keys(), "a family names the decoder's weights"
    found: list[PlacedPart] = []
    for ours, parts in weights.items():
        rows, *inner = shapes[ours]
        told = [None if part.rows is None else -(-(part.rows[1] - part.rows[0]) // part.step) for part in parts]
        open_parts = told.count(None)
        share, rest = divmod(rows - sum(count or 0 for count in told), max(open_parts, 1))
        assert rest == 0 and (open_parts or share == 0), f"the parts of {ours} don't make up its {rows} rows"
        at = 0
        for part, count in zip(parts, told, strict=True):
            length = share if count is None else count
            found.append(PlacedPart(ours, Box((at, *(0 for _ in inner)), (length, *inner)), part))
            at += length
    return found


def tensor_shapes(placed: Iterable[PlacedPart]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the files' tensors: name → shape."""
    found: dict[str, tuple[int, ...]] = {}
    for each in placed:
        matrix = (each.end, *each.box.shape[1:])
        shape = (*(at + 1 for at in each.part.index), *(matrix[::-1] if each.part.transposed else matrix))
        found[each.part.name] = tuple(map(max, shape, found.get(each.part.name, shape)))
    return found
