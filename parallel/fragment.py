"""Fragment: one axis-aligned box of a named global array, and the local tensor that holds it.

This is the type that makes checkpoints universal (rule R6). An engine that can list its fragments can be
saved, restored on any other layout, verified, exported and mirrored. The store needs no notion of a rank.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from .box import Box

REMAINDER = "weight_remainder"
"""Role of what rounding has left of a weight. A weight that is stored without it is its own value: there is nothing to add."""


@dataclass(frozen=True)
class Fragment:
    """One box of a named global array and the local tensor behind it.

    name          canonical parameter name, the same under every layout and engine: "layers.3.attention.wq.weight"; where the
                  role is "run", the name of an array that belongs to no parameter
    role          what the array is to that parameter: "weight" (the master, in its training precision),
                  "exp_avg", "exp_avg_sq", "momentum", …; open-ended
    global_shape  shape of the whole array, which need not be the parameter's (a factored moment, a list of blocks)
    box           where `tensor` lies in it; several ranks may hold the same box (replicas), or boxes that overlap
    tensor        the live local tensor, `tensor.shape == box.shape`; restoring writes into it in place
    splits        logical split points along dim 0 inside the global array (a fused QKV, stacked experts): for export

    An empty box (a rank that holds no rows) is not listed at all.
    """

    name: str
    role: str
    global_shape: tuple[int, ...]
    box: Box
    tensor: torch.Tensor
    splits: tuple[int, ...] = field(default=())

    def __post_init__(self) -> None:
        assert tuple(self.tensor.shape) == self.box.shape, f"{self.key}: tensor {tuple(self.tensor.shape)} in box {self.box}"

    @property
    def key(self) -> str:
        """Name of the global array in a checkpoint: `<role>/<name>`."""
        return f"{self.role}/{self.name}"


def boxes_of_flat_range(shape: tuple[int, ...], start: int, length: int) -> list[tuple[Box, int]]:
    """Cut elements `[start, start + length)` of a row-major array into boxes; each comes with its offset in the range.

    A flat range over d dims needs at most 2d − 1 boxes (ByteCheckpoint's decomposition of ZeRO shards), each of them
    contiguous in the range, so no communication is needed to save an irregular flat partition.
    """
    if length <= 0:
        return []
    if not shape:
        return [(Box((), ()), 0)]
    row = 1
    for extent in shape[1:]:
        row *= extent
    if row == 0:
        return []
    stop = start + length
    first_row, last_row = start // row, (stop - 1) // row
    if len(shape) == 1:
        return [(Box((start,), (length,)), 0)]

    def inside(index: int, lo: int, hi: int) -> list[tuple[Box, int]]:
        """Cut the part [lo, hi) of row `index`, relative to the row, one dim down."""
        return [
            (Box((index, *box.offsets), (1, *box.shape)), index * row + lo + at - start)
            for box, at in boxes_of_flat_range(shape[1:], lo, hi - lo)
        ]

    if first_row == last_row and (start % row or stop % row):
        return inside(first_row, start - first_row * row, stop - first_row * row)
    pieces: list[tuple[Box, int]] = []
    if start % row:
        pieces += inside(first_row, start % row, row)
        first_row += 1
    full_end = stop // row
    if full_end > first_row:
        box = Box((first_row, *(0 for _ in shape[1:])), (full_end - first_row, *shape[1:]))
        pieces.append((box, first_row * row - start))
    if stop % row:
        pieces += inside(full_end, 0, stop % row)
    return pieces
