"""Description of a run's state: which arrays there are, and which rank holds which box of them.

Arrays of one shape are mostly cut alike, so their boxes are kept once, in a table (`Holdings`): a few tables describe the
state of thousands of ranks. Each rank describes its own; on the way up the tree (`control.py`) descriptions are joined.
No shape or cut is a special case: tables of boxes describe meshes, DeepSpeed's flat pieces, blocks that lie across a cut, and
matrices that one rank owns.
"""

from __future__ import annotations

import base64
import functools
import json
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...parallel.box import Box
from ...parallel.fragment import Fragment
from ..dtypes import name_of
from ..errors import CheckpointError
from ..manifest import GlobalArray
from .columns import Integers, columns_of, pack, pack_boxes, unpack, unpack_boxes


@dataclass(frozen=True)
class Declaration(GlobalArray):
    """A rank's description of one of its fragments."""

    box: Box


def declare(fragments: Iterable[Fragment]) -> tuple[Declaration, ...]:
    """Declare a rank's fragments, in their order. Raises CheckpointError for a type that can't be stored."""
    declared: list[Declaration] = []
    for fragment in fragments:
        try:
            dtype = name_of(fragment.tensor.dtype)
        except ValueError as error:
            raise CheckpointError(f"{fragment.key}: {error}") from error
        shape = tuple(fragment.global_shape)
        declared.append(Declaration(fragment.name, fragment.role, dtype, shape, tuple(fragment.splits), fragment.box))
    return tuple(declared)


@dataclass(frozen=True)
class Holdings:
    """Boxes of arrays that are cut alike, with their holders, in the order of the ranks.

    ranks    (n,) rank of each row
    offsets  (n, dims) where its box begins; shapes: (n, dims) its extents
    """

    ranks: Integers
    offsets: Integers
    shapes: Integers


@dataclass(frozen=True)
class Entry(GlobalArray):
    """One array. cut: index of its table in `Description.holdings`"""

    cut: int


def _no_hosts() -> Integers:
    return np.empty((2, 0), np.int64)


@dataclass(frozen=True)
class Description:
    """The state of some ranks.

    text      the arrays, by key in sorted order (`encode_entries`): the same on most ranks, and then never taken apart
    holdings  the tables, in the order in which the arrays first use them
    hosts     (2, ranks) the ranks, and which host each is on, for files of hosts; otherwise nothing is said of them
    """

    text: str
    holdings: tuple[Holdings, ...]
    hosts: Integers = field(default_factory=_no_hosts)

    @property
    def entries(self) -> tuple[Entry, ...]:
        """The arrays."""
        return _decoded(self.text)

    @classmethod
    def of(cls, declarations: Sequence[Declaration], rank: int, host: int | None = None) -> Description:
        """Describe the state of one rank. Raises CheckpointError where it declares an array in two ways.

        host: a number of its host, where it shares a file with the other ranks there
        """
        first: dict[str, Declaration] = {}
        boxes: dict[str, list[Box]] = {}
        for declared in declarations:
            known = first.setdefault(declared.key, declared)
            if (known.dtype, known.shape, known.splits) != (declared.dtype, declared.shape, declared.splits):
                raise _contradiction(known, rank, declared, rank)
            boxes.setdefault(declared.key, []).append(declared.box)
        cuts: dict[tuple[tuple[int, ...], tuple[Box, ...]], int] = {}
        entries: list[Entry] = []
        for key in sorted(first):
            held = first[key].shape, tuple(sorted(set(boxes[key])))
            entries.append(_entry(first[key], cuts.setdefault(held, len(cuts))))
        tables = (Holdings(np.full(len(held), rank, np.int64), *columns_of(held)) for _, held in cuts)
        hosts = _no_hosts() if host is None else np.array([[rank], [host]], np.int64)
        return cls(encode_entries(entries), tuple(tables), hosts)

    def encode(self) -> bytes:
        """Encode as a message."""
        ranks = [table.ranks for table in self.holdings]
        boxes = [(table.offsets, table.shapes) for table in self.holdings]
        content = {
            "entries": self.text,
            "rows": [len(each) for each in ranks],
            "dims": [offsets.shape[1] for offsets, _ in boxes],
            "ranks": pack(np.concatenate(ranks)) if ranks else "",
            "boxes": pack_boxes(boxes) if boxes else "",
        }
        if self.hosts.size:
            content["hosts"] = pack(self.hosts.reshape(-1))
        return json.dumps(content, separators=(",", ":")).encode()

    @classmethod
    def decode(cls, message: bytes) -> Description:
        """Decode what `encode` gave."""
        content: dict[str, Any] = json.loads(message)
        hosts = unpack(content["hosts"]).reshape(2, -1) if "hosts" in content else _no_hosts()
        if not content["rows"]:
            return cls(content["entries"], (), hosts)
        ranks = np.split(unpack(content["ranks"]), np.cumsum(content["rows"])[:-1])
        boxes = unpack_boxes(content["boxes"], content["rows"], content["dims"])
        tables = (Holdings(held, *table) for held, table in zip(ranks, boxes, strict=True))
        return cls(content["entries"], tuple(tables), hosts)


def join(descriptions: Sequence[Description]) -> Description:
    """Join the descriptions of runs of ranks, given in the ranks' order.

    Raises CheckpointError naming the array where ranks contradict each other.
    """
    if len(descriptions) == 1:
        return descriptions[0]
    hosts = np.concatenate([each.hosts for each in descriptions], 1)
    if all(each.text == descriptions[0].text for each in descriptions[1:]):  # nearly always: tables go together by number
        tables = [_stack(tables) for tables in zip(*(each.holdings for each in descriptions), strict=True)]
        return Description(descriptions[0].text, tuple(tables), hosts)
    where: dict[str, list[tuple[int, int]]] = {}  # of each array: (number of the description, its table there)
    known: dict[str, tuple[Entry, int]] = {}
    for number, description in enumerate(descriptions):
        for entry in description.entries:
            first, other = known.setdefault(entry.key, (entry, number))
            if (first.dtype, first.shape, first.splits) != (entry.dtype, entry.shape, entry.splits):
                ranks = [int(descriptions[at].holdings[e.cut].ranks[0]) for at, e in ((number, entry), (other, first))]
                raise _contradiction(first, ranks[1], entry, ranks[0])
            where.setdefault(entry.key, []).append((number, entry.cut))
    cuts: dict[tuple[tuple[int, int], ...], int] = {}
    entries = [_entry(known[key][0], cuts.setdefault(tuple(where[key]), len(cuts))) for key in sorted(known)]
    tables = [_stack([descriptions[number].holdings[cut] for number, cut in parts]) for parts in cuts]
    return Description(encode_entries(entries), tuple(tables), hosts)


def encode_entries(entries: Sequence[Entry]) -> str:
    """Encode arrays as a text."""
    rows = [[e.name, e.role, e.dtype, e.shape, e.splits, e.cut] for e in entries]
    return base64.b64encode(zlib.compress(json.dumps(rows, separators=(",", ":")).encode(), 1)).decode()


@functools.lru_cache(maxsize=8)
def _decoded(text: str) -> tuple[Entry, ...]:
    rows = json.loads(zlib.decompress(base64.b64decode(text)))
    return tuple(Entry(n, r, d, tuple(shape), tuple(splits), cut) for n, r, d, shape, splits, cut in rows)


def _stack(tables: Sequence[Holdings]) -> Holdings:
    columns = ([getattr(table, name) for table in tables] for name in ("ranks", "offsets", "shapes"))
    return Holdings(*(np.concatenate(column) for column in columns))


def _entry(of: GlobalArray, cut: int) -> Entry:
    return Entry(of.name, of.role, of.dtype, of.shape, of.splits, cut)


def _contradiction(first: GlobalArray, first_rank: int, other: GlobalArray, rank: int) -> CheckpointError:
    return CheckpointError(
        f"{other.key}: rank {rank} holds it as {other.dtype}{list(other.shape)}, rank {first_rank} as "
        f"{first.dtype}{list(first.shape)}; one array has one shape, type and set of split points on all ranks"
    )
