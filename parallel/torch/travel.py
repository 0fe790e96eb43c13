"""Exchange the differences of islands in a thread of its own, and bring back their mean.

A rank sends the ranks at its place in the other islands a part each of what it holds (one all-to-all). It decodes what it is
sent, takes the mean in the masters' dtype, island by island, and sends that to all (one all-gather), encoded once more. With K
islands a rank so sends 2 (K − 1) / K of its encoded differences, as a ring does, and every island decodes the same bytes: outer
weights never drift apart. Ranks of an island that hold the same shard send a part of it each, and gather it inside the island.

Everything travels through the host's memory by gloo, in the order in which it leaves, which is the same on all islands.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ...optim.local.aggregate import mean_coefficients, median_coefficients
from ...optim.local.wire import Wire
from ..mesh import Mesh

_CHUNK = 1 << 20
"""Elements of each island that are taken to float64 at once."""


@dataclass(frozen=True)
class Header:
    """Numbers that an island sends ahead of its differences.

    tokens       that it has learned them from
    stop         whether it wants the run to stop
    loss         the sum of the token losses of the steps since it sent last, as far as it knows them; `loss_tokens` of these
    """

    tokens: float
    stop: bool = False
    loss: float = 0.0
    loss_tokens: float = 0.0

    def row(self) -> torch.Tensor:
        """Return it as numbers, (1, 4)."""
        return torch.tensor([[self.tokens, float(self.stop), self.loss, self.loss_tokens]], dtype=torch.float64)


def mean_loss(headers_K4: torch.Tensor) -> float | None:
    """Return the mean loss of all islands' tokens; None if there are none.

    An island whose loss is no number is left out, so that it does not hide those of the others.
    """
    loss, tokens = headers_K4[headers_K4[:, 2].isfinite(), 2:].sum(0).tolist()
    return loss / tokens if tokens else None


@dataclass
class Flight:
    """Differences under way.

    due     the step after which their mean is used
    tokens  that this island has learned them from
    loss    the mean loss of all islands' tokens in the steps in which they learned them, but for islands whose loss is no
            number; None: not known
    """

    due: int
    tokens: float
    loss: float | None = None
    thread: threading.Thread | None = None
    mean: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    stops: bool = False
    error: BaseException | None = None

    def wait(self) -> None:
        """Wait until the mean is here. Raises what went wrong on the way."""
        if self.thread is not None:
            self.thread.join()
        if self.error is not None:
            raise self.error


@dataclass(frozen=True)
class GramSum:
    """Takes the scalar products of the islands' differences over all shards, for their geometric median.

    group   of all ranks of all islands, gloo's, which nothing else uses
    counts  by shard, how much it counts: where ranks hold copies of it that do not share the work, a part
    """

    group: dist.ProcessGroup
    counts: Sequence[float]

    def sum(self, parts: torch.Tensor, counts: torch.Tensor | None) -> torch.Tensor:
        """Return the products (K, K) in float64, of this rank's parts (K, n) and those of the others. A collective.

        counts: (n,), of each element; None: all count once
        """
        gram = torch.zeros(len(parts), len(parts), dtype=torch.float64)
        for first in range(0, parts.shape[1], _CHUNK):
            chunk = parts[:, first : first + _CHUNK].double()
            gram += (chunk if counts is None else chunk * counts[first : first + _CHUNK]) @ chunk.T
        dist.all_reduce(gram, group=self.group)
        return gram


class Route:
    """The way of one group of shards. All shards have the same dtype and device.

    sent_bytes    that this rank has sent to other islands; wait_seconds: for which its host has waited for flights. Whoever
                  reads them sets them back
    """

    _newest: threading.Thread | None = None  # of all routes of the process: they share a process group

    def __init__(
        self,
        mesh: Mesh,
        copies: DeviceMesh,
        wire: Wire,
        shapes: Sequence[torch.Size],
        like: torch.Tensor | None,
        gram: GramSum | None = None,
    ) -> None:
        """copies: ranks of the island that hold the same shards; like: one of the shards, None: there is none here

        gram: by which differences become their geometric median; None: their mean
        """
        self._across, self._wire, self._shapes = mesh.across, wire, shapes
        self._islands = 1 if mesh.across is None else mesh.across.size()  # where all others are lost, nothing travels
        self._copies = copies
        self._device = mesh.device if like is None else like.device
        self._dtype = torch.float32 if like is None else like.dtype
        self._numel = sum(map(prod, shapes))
        unit = copies.size() * self._islands * wire.block
        self._part = max(1, -(-self._numel // unit)) * wire.block
        self._gram = gram
        self._counts: torch.Tensor | None = None  # of my part, how much each element counts in scalar products
        if gram is not None and any(each != 1 for each in gram.counts):
            spread = torch.ones(unit // wire.block * self._part, dtype=torch.float64)
            numbers = torch.tensor(gram.counts, dtype=torch.float64)
            spread[: self._numel] = numbers.repeat_interleave(torch.tensor([prod(shape) for shape in shapes]))
            self._counts = spread.view(copies.size(), self._islands, self._part)[copies.get_local_rank(), mesh.island_number]
        self.sent_bytes, self.wait_seconds = 0, 0.0

    def send(self, differences: Sequence[torch.Tensor], due: int, header: Header) -> Flight:
        """Send differences off. They may be written to afterwards."""
        numbers = torch.zeros(self._copies.size() * self._islands * self._part, dtype=self._dtype, device=self._device)
        if differences:
            torch.cat([each.reshape(-1) for each in differences], out=numbers[: self._numel])
        mine = numbers.view(self._copies.size(), self._islands, self._part)[self._copies.get_local_rank()]
        sent = self._wire.encode(mine).cpu()
        self.sent_bytes += 2 * sent.numel() // self._islands * (self._islands - 1)
        flight = Flight(due, header.tokens)
        flight.thread = threading.Thread(
            target=self._travel, args=(flight, sent, header, Route._newest), name="between-islands", daemon=True
        )
        Route._newest = flight.thread
        flight.thread.start()
        return flight

    @torch.no_grad()
    def _travel(self, flight: Flight, sent: torch.Tensor, header: Header, before: threading.Thread | None) -> None:
        try:
            if before is not None:
                before.join()
            headers = self._of_all(header.row())
            received = sent
            if self._across is not None:
                received = torch.empty_like(sent)
                dist.all_to_all_single(received, sent, group=self._across)
            parts = self._wire.decode(received, self._dtype)
            mean = torch.zeros(1, self._part, dtype=self._dtype)
            for part, share in zip(parts, self._coefficients(parts, headers[:, 0]), strict=True):
                if share:  # what counts for nothing need not be finite
                    mean[0].add_(part, alpha=share)  # in the order of the islands, on all of them
            flight.loss = mean_loss(headers)
            flight.mean, flight.stops = self._of_all(self._wire.encode(mean)), bool(headers[:, 1].any())
        except BaseException as error:
            flight.error = error

    def _coefficients(self, parts: torch.Tensor, tokens: torch.Tensor) -> list[float]:
        """Return how much of each island's difference there is in what they become. parts: (K, n) of them, tokens: (K,)"""
        if self._gram is None:
            return mean_coefficients(tokens).tolist()
        return median_coefficients(self._gram.sum(parts, self._counts), tokens).tolist()

    def _of_all(self, row: torch.Tensor) -> torch.Tensor:
        """Return the rows (1, n) of all islands, (K, n)."""
        if self._across is None:
            return row
        rows = row.new_empty(self._islands, row.shape[-1])
        dist.all_gather(list(rows.split(1)), row, self._across)
        return rows

    def receive(self, flight: Flight) -> tuple[list[torch.Tensor], bool]:
        """Return the mean of all islands' differences, each counted by its tokens, and whether one of them asked to stop.

        A collective over the ranks that hold the same shards. The host waits for the flight.
        """
        begun = time.monotonic()
        flight.wait()
        self.wait_seconds += time.monotonic() - begun
        mean = self._wire.decode(flight.mean.to(self._device), self._dtype).reshape(-1)
        if self._copies.size() > 1:
            parts = mean.new_empty(self._copies.size() * len(mean))
            dist.all_gather(list(parts.split(len(mean))), mean, self._copies.get_group())
            mean = parts
        pieces = mean[: self._numel].split([prod(shape) for shape in self._shapes])
        return [piece.view(shape) for piece, shape in zip(pieces, self._shapes, strict=True)], flight.stops
