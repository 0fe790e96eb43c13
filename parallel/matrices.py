"""Whole matrices from shards: each is gathered to the one rank that owns it, computed there, and its parts sent back.

A matrix method (Muon, SOAP) needs whole matrices (rule R4). Gathering every matrix on every rank would repeat the same
products on all of them. Here each matrix is computed once. Owners are chosen among the ranks that hold a part, heaviest
matrix first, each for the least loaded rank. Every rank derives the same plan from all ranks' boxes, which are exchanged once.

Matrices travel in waves of bounded size, by uneven all-to-all. While one wave is computed the next arrives, and the
results of the last one leave.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from ..optim.optimizers.parameters import Matrix, MatrixFunction, NamedParameter, matrices_of, number_waves
from .box import Box
from .mesh import Mesh


@dataclass(frozen=True)
class Part:
    """A part of a matrix. number: of the matrix, or of the parameter whose shard it is cut from; box: within either."""

    number: int
    box: Box


@dataclass
class Wave:
    """This rank's work for some matrices: parts per peer, each list in an order that both sides derive.

    send     parts of my shards, to the owners       collect  parts of my matrices, from the ranks that hold them
    give     parts of my results, to all holders     receive  parts of my shards' results, from the owners
    """

    owned: list[int] = field(default_factory=list[int])
    send: dict[int, list[Part]] = field(default_factory=dict[int, list[Part]])
    collect: dict[int, list[Part]] = field(default_factory=dict[int, list[Part]])
    give: dict[int, list[Part]] = field(default_factory=dict[int, list[Part]])
    receive: dict[int, list[Part]] = field(default_factory=dict[int, list[Part]])


@dataclass(frozen=True)
class _Held:
    """A part of a matrix, and the ranks that hold it. box: within the parameter."""

    box: Box
    ranks: tuple[int, ...]


def held_parts(matrix: Matrix, boxes: Sequence[Box]) -> list[_Held]:
    """List the parts that a matrix is cut into. boxes: of its parameter, by rank; copies of a box are one part."""
    rows, columns = matrix.shape
    whole = Box((matrix.first_row, 0), (rows, columns))
    holders: dict[Box, list[int]] = {}
    for rank, box in enumerate(boxes):
        overlap = box.intersect(whole)
        if overlap is not None and overlap.numel:
            holders.setdefault(overlap, []).append(rank)
    return [_Held(box, tuple(ranks)) for box, ranks in holders.items()]


def choose_owners(costs: Sequence[float], candidates: Sequence[Sequence[int]]) -> list[int]:
    """Choose an owner for each matrix: the heaviest first, each to the least loaded of its candidates."""
    loads: dict[int, float] = {}
    owners = [0] * len(costs)
    for number in sorted(range(len(costs)), key=lambda each: (-costs[each], each)):
        owner = min(candidates[number], key=lambda rank: (loads.get(rank, 0.0), rank))
        loads[owner] = loads.get(owner, 0.0) + costs[number]
        owners[number] = owner
    return owners


class MeshMatrices:
    """`WholeMatrices` over the ranks of a pipeline stage. Making one, and `map`, are collectives."""

    def __init__(
        self,
        mesh: Mesh,
        boxes: Mapping[str, Box],
        parameters: Sequence[NamedParameter],
        cost: Callable[[int, int], float],
    ) -> None:
        """boxes: this rank's, by the parameter's name; cost: see `Shards.whole_matrices`."""
        self._group, self._device = mesh.group("stage"), mesh.device
        self._rank, self._ranks = mesh.axes["stage"].get_local_rank(), mesh.size("stage")
        self._matrices = matrices_of(parameters)
        self._waves = self._plan(parameters, self._all_boxes([boxes[each.name] for each in parameters]), cost)
        self.owned: Sequence[Matrix] = [self._matrices[number] for wave in self._waves for number in wave.owned]

    def _all_boxes(self, mine: Sequence[Box]) -> list[list[Box]]:
        """Exchange the boxes of all ranks: by rank, then by parameter."""
        table = torch.tensor([[*box.offsets, *box.shape] for box in mine], device=self._device).view(-1, 4)
        everyone = [torch.empty_like(table) for _ in range(self._ranks)]
        dist.all_gather(everyone, table, self._group)
        return [[Box((a, b), (c, d)) for a, b, c, d in each.tolist()] for each in everyone]

    def _plan(
        self, parameters: Sequence[NamedParameter], boxes: Sequence[Sequence[Box]], cost: Callable[[int, int], float]
    ) -> list[Wave]:
        position = {parameter.name: number for number, parameter in enumerate(parameters)}
        of = [position[matrix.parameter.name] for matrix in self._matrices]
        held = [held_parts(matrix, [each[number] for each in boxes]) for matrix, number in zip(self._matrices, of, strict=True)]
        candidates = [sorted({rank for part in parts for rank in part.ranks}) for parts in held]
        owners = choose_owners([cost(*matrix.shape) for matrix in self._matrices], candidates)
        numbers = number_waves(self._matrices, owners)
        waves = [Wave() for _ in range(max(numbers, default=-1) + 1)]
        for number, (matrix, owner) in enumerate(zip(self._matrices, owners, strict=True)):
            wave, mine = waves[numbers[number]], owner == self._rank
            if mine:
                wave.owned.append(number)
            for part in held[number]:
                in_matrix = Part(number, part.box.shifted((-matrix.first_row, 0)))
                # Of copies one sends: the owner's own, or each in turn.
                source = owner if owner in part.ranks else part.ranks[number % len(part.ranks)]
                if mine:
                    wave.collect.setdefault(source, []).append(in_matrix)
                    for rank in part.ranks:
                        wave.give.setdefault(rank, []).append(in_matrix)
                if self._rank in part.ranks:
                    begin = boxes[self._rank][of[number]].offsets
                    in_shard = Part(of[number], part.box.shifted((-begin[0], -begin[1])))
                    wave.receive.setdefault(owner, []).append(in_shard)
                    if source == self._rank:
                        wave.send.setdefault(owner, []).append(in_shard)
        return waves

    def map(self, parts: Sequence[torch.Tensor], function: MatrixFunction, dtype: torch.dtype) -> list[torch.Tensor]:
        """Apply a function to every whole matrix, each on its owner, and return this rank's parts of the results."""
        results = [torch.empty_like(part, dtype=dtype) for part in parts]
        leaving: list[_Exchange] = []
        arriving = self._exchange(self._waves[0].send, parts, self._waves[0].collect, dtype) if self._waves else None
        for wave, following in zip(self._waves, [*self._waves[1:], None], strict=True):
            assert arriving is not None
            current = arriving
            arriving = self._exchange(following.send, parts, following.collect, dtype) if following else None
            whole = {n: torch.empty(self._matrices[n].shape, dtype=dtype, device=self._device) for n in wave.owned}
            _deliver(current, whole)
            results_of = function([self._matrices[number] for number in wave.owned], list(whole.values())) if whole else []
            computed = dict(zip(whole, results_of, strict=True))
            leaving.append(self._exchange(wave.give, computed, wave.receive, dtype))
            if len(leaving) > 1:
                _deliver(leaving.pop(0), results)
        for exchange in leaving:
            _deliver(exchange, results)
        return results

    def _exchange(
        self,
        outgoing: Mapping[int, Sequence[Part]],
        arrays: Sequence[torch.Tensor] | Mapping[int, torch.Tensor],
        incoming: Mapping[int, Sequence[Part]],
        dtype: torch.dtype,
    ) -> _Exchange:
        """Begin to send parts of arrays to peers, and to receive what they send."""

        def count(parts: Sequence[Part]) -> int:
            return sum(part.box.numel for part in parts)

        flat = [arrays[p.number][p.box.slices()].to(dtype).flatten() for _, parts in _by_rank(outgoing) for p in parts]
        sent = torch.cat(flat) if flat else torch.empty(0, dtype=dtype, device=self._device)
        received = torch.empty(sum(map(count, incoming.values())), dtype=dtype, device=self._device)
        out_splits, in_splits = ([count(of.get(rank, ())) for rank in range(self._ranks)] for of in (outgoing, incoming))
        work = dist.all_to_all_single(received, sent, in_splits, out_splits, self._group, async_op=True)
        return _Exchange(work, sent, received, [part for _, parts in _by_rank(incoming) for part in parts])


@dataclass
class _Exchange:
    """An all-to-all under way. sent: kept until it is over."""

    work: Any
    sent: torch.Tensor
    received: torch.Tensor
    parts: list[Part]

    def wait(self) -> Iterator[tuple[Part, torch.Tensor]]:
        """Wait for the parts, and yield each with its values."""
        self.work.wait()
        pieces = self.received.split([part.box.numel for part in self.parts])
        for part, values in zip(self.parts, pieces, strict=True):
            yield part, values.view(part.box.shape)


def _deliver(exchange: _Exchange, arrays: Mapping[int, torch.Tensor] | Sequence[torch.Tensor]) -> None:
    """Wait for an exchange, and write the parts that arrived into their arrays."""
    for part, values in exchange.wait():
        arrays[part.number][part.box.slices()] = values


def _by_rank(parts: Mapping[int, Sequence[Part]]) -> list[tuple[int, Sequence[Part]]]:
    return sorted(parts.items())
