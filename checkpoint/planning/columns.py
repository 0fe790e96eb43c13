"""Many integers as a short text: differences of neighbours, compressed. Cuts over ranks are regular, so little is left."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from ...parallel.box import Box

Integers = np.ndarray[Any, np.dtype[np.int64]]
Table = tuple[Integers, Integers]
"""Boxes, one a row: (rows, dims) their offsets, and (rows, dims) their extents."""


def pack(values: Integers | Sequence[int]) -> str:
    """Pack integers: base64 of zlib of the differences as little-endian int64, the first one's to zero."""
    differences = np.diff(np.asarray(values, "<i8"), prepend=np.int64(0))
    return base64.b64encode(zlib.compress(differences.astype("<i8").tobytes(), 6)).decode()


def unpack(text: str) -> Integers:
    """Unpack what `pack` gave. Raises ValueError for anything else."""
    try:
        return np.cumsum(np.frombuffer(zlib.decompress(base64.b64decode(text, validate=True)), "<i8"))
    except zlib.error as error:
        raise ValueError(f"a column of integers is damaged: {error}") from error


def columns_of(boxes: Sequence[Box]) -> Table:
    """Make a table of boxes, of which there is one at least."""
    size = len(boxes), len(boxes[0].shape)
    offsets, shapes = ([getattr(box, name) for box in boxes] for name in ("offsets", "shape"))
    return np.array(offsets, np.int64).reshape(size), np.array(shapes, np.int64).reshape(size)


def pack_boxes(tables: Sequence[Table]) -> str:
    """Pack tables of boxes, one after the other, dim by dim: the offsets first, then the extents."""
    return pack(np.concatenate([column.T.reshape(-1) for table in tables for column in table]))


def unpack_boxes(text: str, rows: Iterable[int], dims: Iterable[int]) -> Iterator[Table]:
    """Unpack what `pack_boxes` gave. rows, dims: of each table. Raises ValueError for anything else."""
    values, at = unpack(text), 0
    for count, width in zip(rows, dims, strict=True):
        size = count * width
        offsets, shapes = (values[start : start + size].reshape(width, count).T for start in (at, at + size))
        yield offsets, shapes
        at += 2 * size
