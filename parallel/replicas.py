"""Compare the copies of weights and optimizer state that ranks hold, by hashes that are computed on the device.

Copies of one array agree bit for bit, because they are updated by the same kernels from the same sums. A flipped bit on one
rank breaks that, and nothing else tells: every rank's loss stays finite.

The hash of a tensor is the sum, modulo 2^64, of its words times odd random numbers that belong to their positions. One changed
word always changes it, since an odd number has an inverse. Words that change places do, too, unlike with `torch.hash_tensor`,
which is an exclusive or. Each rank adds up the hashes of the fragments that the same ranks hold, and exchanges a few numbers.

Only ranks with the same pipeline and tensor-parallel coordinates are compared: tensor-parallel ranks compute gradients of what
they all hold each by itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from .fragment import Fragment
from .mesh import Mesh

BLOCK, SMALL = 1 << 22, 1 << 14
"""Words that are hashed at once: 32 MiB of numbers for their positions, and as much for products; of small tensors fewer."""
_STRETCH = 1 << 12
"""Elements that are looked at one by one where copies differ."""
_CHAIN = 0x2545F4914F6CDD1D  # odd: joins the hashes of a tensor's blocks


Part = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets and shape of a part of an array."""


@dataclass(frozen=True)
class Disagreement:
    """Copies that differ.

    holders  the ranks that hold them, and `hashes` theirs, in this order
    odd      the ranks that differ from most of them; all holders where there is no majority
    arrays   the arrays that differ, as `role/name`; weights first
    element  the first element of the first of them that differs, counted in the part that these ranks hold; None: none does
             any more, since the next update has rounded a small difference away
    values   what each holder has there; empty where element is None
    box      offsets and shape of that part in the whole array
    """

    holders: tuple[int, ...]
    hashes: tuple[int, ...]
    odd: tuple[int, ...]
    arrays: tuple[str, ...]
    element: int | None
    values: tuple[float, ...]
    box: Part


class Replicas:
    """The copies among the fragments of all ranks. Every rank makes and uses it alike."""

    def __init__(self, mesh: Mesh, fragments: Iterable[Fragment]) -> None:
        self._mesh = mesh
        self._fragments = list(fragments)
        at = mesh.coordinates
        place = (at["pp"], at["tp"])
        mine = [(place, each.key, each.box.offsets, each.box.shape) for each in self._fragments]
        listed = mesh.gather_objects(mine)
        holders: dict[object, list[int]] = {}
        for rank, keys in enumerate(listed):
            for key in keys:
                holders.setdefault(key, []).append(rank)
        sets = sorted({tuple(ranks) for ranks in holders.values() if len(ranks) > 1})
        self.sets: Sequence[tuple[int, ...]] = sets
        """The sets of ranks that hold the same fragments."""
        mine_set = [tuple(holders[key]) for key in mine]
        self.elements = sum(each.box.numel for each in self._fragments)
        self.copied = sum(each.box.numel for each, held in zip(self._fragments, mine_set, strict=True) if len(held) > 1)
        """Elements of this rank, and those of them that another rank holds, too."""
        counts = mesh.sum(torch.tensor([self.copied, self.elements], dtype=torch.float64, device=mesh.device)).tolist()
        self.share = counts[0] / counts[1] if counts[1] else 0.0
        """Share of what all ranks hold of which another rank holds a copy."""
        self._compared = [(each, held) for each, held in zip(self._fragments, mine_set, strict=True) if len(held) > 1]
        self._own_sets = sorted({held for _, held in self._compared})
        device = mesh.device
        self._index = torch.tensor([self._own_sets.index(held) for _, held in self._compared], dtype=torch.int64, device=device)
        self._numbers = _position_numbers(len(self._compared)).to(device)
        # Where each rank's hash of each set stands in the table of all ranks, and the first holder's of the same set.
        self._columns = max((sum(rank in held for held in sets) for rank in range(mesh.layout.world_size)), default=0)
        pairs = [(self._at(held[0], held), self._at(rank, held)) for held in sets for rank in held[1:]]
        self._pairs_2P = torch.tensor(pairs, dtype=torch.int64, device=device).reshape(-1, 2).T
        self._hashes = torch.empty(0, dtype=torch.int64, device=device)

    def _at(self, rank: int, held: tuple[int, ...]) -> int:
        return rank * self._columns + [each for each in self.sets if rank in each].index(held)

    def same_fragments(self, fragments: Sequence[Fragment]) -> bool:
        """Return whether these are the fragments that it was made for: state that came later is not among them."""
        return len(fragments) == len(self._fragments) and all(
            one.tensor.data_ptr() == two.tensor.data_ptr() for one, two in zip(fragments, self._fragments, strict=True)
        )

    @torch.no_grad()
    def table(self) -> torch.Tensor:
        """Hash this rank's copies and exchange the sums: (ranks · columns,) int64, on the device. One small collective."""
        hashes = [hash_tensor(each.tensor) for each, _ in self._compared]
        table = torch.zeros(self._mesh.layout.world_size * self._columns, dtype=torch.int64, device=self._mesh.device)
        if hashes:
            self._hashes = torch.stack([each.to(self._mesh.device) for each in hashes])
            own = torch.zeros(len(self._own_sets), dtype=torch.int64, device=self._mesh.device)
            own.index_add_(0, self._index, self._hashes * self._numbers)
            begin = self._mesh.rank * self._columns
            table[begin : begin + len(own)] = own
        return self._mesh.sum(table)

    def differing(self, table: torch.Tensor) -> torch.Tensor:
        """Count the copies that differ from the first holder's, on the device; the same on every rank."""
        first, others = table[self._pairs_2P[0]], table[self._pairs_2P[1]]
        return (first != others).sum()

    def hashes_of(self, table: Sequence[int], held: tuple[int, ...]) -> tuple[int, ...]:
        """Return the hashes of a set's ranks, in order. table: read to the host"""
        return tuple(table[self._at(rank, held)] for rank in held)

    def disagreements(self, table: Sequence[int]) -> list[Disagreement]:
        """Find who differs from whom, and in which arrays. A collective over all ranks, right after `table`."""
        hashed = zip(self._compared, self._hashes.tolist(), strict=True)
        named = {(each.key, _part_of(each)): int(number) for (each, _), number in hashed}
        everywhere = self._mesh.gather_objects(named)
        found: list[Disagreement] = []
        for held in self.sets:
            hashes = self.hashes_of(table, held)
            if len(set(hashes)) == 1:
                continue
            (usual, times), *_ = Counter(hashes).most_common()
            odd = tuple(rank for rank, each in zip(held, hashes, strict=True) if each != usual)
            parts = [part for part in everywhere[held[0]] if len({everywhere[rank].get(part) for rank in held}) > 1]
            parts.sort(key=lambda part: not part[0].startswith("weight/"))
            element, values = self._first_difference(held, *parts[0])
            odd = odd if 2 * times > len(held) else held
            arrays = tuple(dict.fromkeys(key for key, _ in parts))
            found.append(Disagreement(held, hashes, odd, arrays, element, values, parts[0][1]))
        return found

    def _part(self, held: tuple[int, ...], key: str, box: Part) -> torch.Tensor | None:
        """Return this rank's part of an array in a box, flat, that just these ranks hold."""
        parts = [each.tensor for each, by in self._compared if (each.key, _part_of(each), by) == (key, box, held)]
        return parts[0].detach().reshape(-1) if parts else None

    def values(self, held: tuple[int, ...], key: str, box: Part, element: int) -> tuple[float, ...]:
        """Return an element of a part as each of its holders has it; empty where they don't hold it. A collective over all."""
        part = self._part(held, key, box)
        everywhere = self._mesh.gather_objects(None if part is None else float(part[element]))
        there = [everywhere[rank] for rank in held if rank < len(everywhere)]
        return () if None in there or len(there) < len(held) else tuple(there)

    def _first_difference(self, held: tuple[int, ...], key: str, box: Part) -> tuple[int | None, tuple[float, ...]]:
        """Find the first element that differs, by hashes of stretches. A collective over all ranks."""
        part = self._part(held, key, box)
        stretch = self._differing(held, None if part is None else part.split(_STRETCH))
        if stretch is None:
            return None, ()
        begin = stretch * _STRETCH
        offset = self._differing(held, None if part is None else part[begin : begin + _STRETCH].split(1))
        assert offset is not None
        return begin + offset, self.values(held, key, box, begin + offset)

    def _differing(self, held: tuple[int, ...], pieces: Sequence[torch.Tensor] | None) -> int | None:
        """Return the first piece that the holders do not have alike; None: there is none. A collective over all ranks."""
        everywhere = self._mesh.gather_objects(None if pieces is None else [int(hash_tensor(each)) for each in pieces])
        of_holders = zip(*(everywhere[rank] for rank in held), strict=True)
        return next((number for number, hashes in enumerate(of_holders) if len(set(hashes)) > 1), None)


def _part_of(fragment: Fragment) -> Part:
    return tuple(fragment.box.offsets), tuple(fragment.box.shape)


def hash_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Hash a tensor's bits with their positions, on its device: see the module. Returns one int64."""
    words = _words(tensor)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    block = SMALL if len(words) <= SMALL else BLOCK
    numbers = _numbers_on(tensor.device, block)
    for begin in range(0, len(words), block):
        part = words[begin : begin + block]
        total = total * _CHAIN + (part.to(torch.int64) * numbers[: len(part)]).sum()
    return total


def _words(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor's bits as integers: of 64 bits where they can be seen so, otherwise of the element's size."""
    flat = tensor.detach().contiguous().view(-1)
    size = flat.element_size()
    if flat.numel() * size % 8 == 0 and flat.storage_offset() * size % 8 == 0 and flat.data_ptr() % 8 == 0:
        return flat.view(torch.int64)
    return flat.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size])


def _position_numbers(count: int) -> torch.Tensor:
    """Draw odd numbers, the same on every rank."""
    generator = torch.Generator().manual_seed(0x5EED)
    return torch.randint(-(2**63), 2**63 - 1, (count,), generator=generator, dtype=torch.int64) | 1


_numbers: dict[tuple[torch.device, int], torch.Tensor] = {}


def _numbers_on(device: torch.device, count: int) -> torch.Tensor:
    if (device, count) not in _numbers:
        _numbers[device, count] = _position_numbers(count).to(device)
    return _numbers[device, count]
