"""Whole matrices from shards: each is gathered to the one rank that owns it, computed there, and its parts sent back.

A matrix method (Muon, SOAP) needs whole matrices (rule R4). Gathering every matrix on every rank would repeat the same
products on all of them. Here each matrix is computed once. Owners are chosen among the ranks that hold a part, heaviest
matrix first, each for the least loaded rank. Every rank derives the same plan from all ranks' boxes, which are exchanged once.

Matrices travel in waves of bounded size, by uneven all-to-all: among all ranks, or in levels (`exchange_levels.py`), where a
rank of thousands sends few messages. While one wave is computed the next ones arrive, and the results of the last ones leave.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ..optim.optimizers.parameters import Matrix, MatrixFunction, NamedParameter, matrices_of, number_waves
from .box import Box
from .exchange_groups import groups_of_levels
from .matrix_plan import MatrixPlan
from .mesh import Mesh
from .routes import Hop, Numbers

PartPlace = tuple[int, tuple[slice, slice]]
"""The place of a part: the number of an array, and an index into it."""


@dataclass(frozen=True)
class _Exchange:
    """An all-to-all of parts.

    take                         of each part to send, its number among those that are held
    send_splits, receive_splits  elements for each rank of the group, and from it
    pieces                       elements of each part that arrives
    """

    group: dist.ProcessGroup
    take: list[int]
    send_splits: list[int]
    receive_splits: list[int]
    pieces: list[int]


@dataclass(frozen=True)
class _Way:
    """The way of a wave's parts through this rank. begin, end: places of those that are held at first, and at last"""

    begin: list[PartPlace]
    exchanges: list[_Exchange]
    end: list[PartPlace]


class MeshMatrices:
    """`WholeMatrices` over the ranks of a pipeline stage. Making one, and `map`, are collectives."""

    def __init__(
        self,
        mesh: Mesh,
        boxes: Mapping[str, Box],
        parameters: Sequence[NamedParameter],
        cost: Callable[[int, int], float],
        levels: Sequence[int],
    ) -> None:
        """boxes: this rank's, by the parameter's name; cost: see `Shards.whole_matrices`; levels: of the ranks of the stage."""
        self._device, self._groups = mesh.device, groups_of_levels(mesh, mesh.axes["stage"], levels)
        self._matrices = matrices_of(parameters)
        position = {parameter.name: number for number, parameter in enumerate(parameters)}
        spans = [(position[each.parameter.name], each.first_row, *each.shape) for each in self._matrices]
        mine = np.array([[*boxes[each.name].offsets, *boxes[each.name].shape] for each in parameters], dtype=np.int64)
        plan = MatrixPlan.of(spans, self._all_boxes(mesh, mine.reshape(-1, 4)), cost, levels)

        def in_shard(part: int) -> PartPlace:
            parameter, *_ = spans[plan.parts.matrix[part]]
            return parameter, _index(plan.parts.boxes[part], mine[parameter, 0], mine[parameter, 1])

        def in_matrix(part: int) -> PartPlace:
            matrix = int(plan.parts.matrix[part])
            return matrix, _index(plan.parts.boxes[part], spans[matrix][1], 0)

        waves = list(plan.waves(mesh.axes["stage"].get_local_rank(), number_waves(self._matrices, plan.owners)))
        self._owned = [wave.owned for wave in waves]
        self._gathers = [self._way(wave.gather, plan.parts.sizes, in_shard, in_matrix) for wave in waves]
        self._scatters = [self._way(wave.scatter, plan.parts.sizes, in_matrix, in_shard) for wave in waves]
        self.owned: Sequence[Matrix] = [self._matrices[number] for owned in self._owned for number in owned]

    def _all_boxes(self, mesh: Mesh, mine: Numbers) -> Numbers:
        """Exchange the boxes of all ranks: (ranks, parameters, 4)."""
        table = torch.from_numpy(mine).to(self._device)
        everyone = table.new_empty(mesh.size("stage"), *table.shape)
        dist.all_gather(list(everyone), table, mesh.group("stage"))
        return everyone.cpu().numpy()

    def _way(
        self, hops: Sequence[Hop], sizes: Numbers, begin: Callable[[int], PartPlace], end: Callable[[int], PartPlace]
    ) -> _Way:
        """Prepare hops. sizes: of all parts; begin, end: the places of a part where it is held at first, and at last"""
        held = first = np.unique(hops[0].send)  # a part for several ranks is sent several times
        exchanges: list[_Exchange] = []
        for hop in hops:
            group = self._groups[hop.level]
            order = np.argsort(held)
            take = order[np.searchsorted(held, hop.send, sorter=order)]
            send, receive = (
                np.bincount(peers, sizes[parts], group.size()).astype(np.int64).tolist()
                for parts, peers in ((hop.send, hop.to), (hop.receive, hop.came_from))
            )
            exchanges.append(_Exchange(group, take.tolist(), send, receive, sizes[hop.receive].tolist()))
            held = hop.receive
        return _Way([begin(int(part)) for part in first], exchanges, [end(int(part)) for part in held])

    def map(self, parts: Sequence[torch.Tensor], function: MatrixFunction, dtype: torch.dtype) -> list[torch.Tensor]:
        """Apply a function to every whole matrix, each on its owner, and return this rank's parts of the results."""
        results = [torch.empty_like(part, dtype=dtype) for part in parts]

        def depart(way: _Way, arrays: Sequence[torch.Tensor] | Mapping[int, torch.Tensor]) -> _Journey:
            return _Journey(way, arrays, dtype, self._device)

        # In each turn every journey makes a hop, so that there are as many waves on their way as hops.
        depth = len(self._groups)
        arriving = deque(depart(way, parts) for way in self._gathers[:depth])
        following = iter(self._gathers[depth:])
        leaving: deque[_Journey] = deque()
        for owned, scatter in zip(self._owned, self._scatters, strict=True):
            arrived = arriving.popleft()
            _advance(arriving)
            arriving.extend(depart(way, parts) for way in [next(following, None)] if way)
            computed = self._compute(owned, arrived, function, dtype)
            _advance(leaving)
            if len(leaving) == depth:
                leaving.popleft().arrive(results)
            leaving.append(depart(scatter, computed))
            del computed  # before there are matrices of another wave
        while leaving:
            leaving.popleft().arrive(results)
        return results

    def _compute(
        self, owned: Sequence[int], arriving: _Journey, function: MatrixFunction, dtype: torch.dtype
    ) -> Mapping[int, torch.Tensor]:
        """Apply a function to the matrices of a wave that this rank owns. Returns the results by their numbers."""
        whole = {n: torch.empty(self._matrices[n].shape, dtype=dtype, device=self._device) for n in owned}
        arriving.arrive(whole)
        results = function([self._matrices[number] for number in owned], list(whole.values())) if whole else []
        return dict(zip(whole, results, strict=True))


class _Journey:
    """Parts under way: an exchange is pending, and others may follow."""

    def __init__(
        self,
        way: _Way,
        arrays: Sequence[torch.Tensor] | Mapping[int, torch.Tensor],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Begin the first exchange. arrays: in which the parts lie at first; dtype: in which they travel"""
        self._way, self._like, self._next = way, torch.empty(0, dtype=dtype, device=device), 0
        self._begin([arrays[number][index].to(dtype).flatten() for number, index in way.begin])

    def _begin(self, held: Sequence[torch.Tensor]) -> None:
        exchange = self._way.exchanges[self._next]
        self._next += 1
        self._sent = torch.cat([self._like, *(held[number] for number in exchange.take)])  # kept until it has been sent
        self._received = self._like.new_empty(sum(exchange.pieces))
        splits = exchange.receive_splits, exchange.send_splits
        self._work: Any = dist.all_to_all_single(self._received, self._sent, *splits, exchange.group, async_op=True)

    def _wait(self) -> Sequence[torch.Tensor]:
        self._work.wait()
        return self._received.split(self._way.exchanges[self._next - 1].pieces)

    def advance(self) -> None:
        """Begin the next exchange when the pending one is over. Does nothing if that is the last one."""
        if self._next < len(self._way.exchanges):
            self._begin(self._wait())

    def arrive(self, arrays: Sequence[torch.Tensor] | Mapping[int, torch.Tensor]) -> None:
        """Complete all exchanges, and write the parts into their arrays."""
        while self._next < len(self._way.exchanges):
            self.advance()
        for (number, index), values in zip(self._way.end, self._wait(), strict=True):
            array = arrays[number][index]
            array.copy_(values.view(array.shape))
        del self._sent, self._received, self._work  # a wave's bytes, for whoever still names this journey


def _advance(journeys: Iterable[_Journey]) -> None:
    """Advance all; a function, so that no loop's variable keeps a journey when it is over."""
    for journey in journeys:
        journey.advance()


def _index(box: Numbers, first_row: int, first_column: int) -> tuple[slice, slice]:
    """Return the index of a part's box in an array that begins at this row and column of the parameter."""
    row, column, rows, columns = (int(each) for each in box)
    row, column = row - int(first_row), column - int(first_column)
    return slice(row, row + rows), slice(column, column + columns)
