"""How differences travel between islands, in a thread of their own, and come back as their mean.

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

from ...optim.local.wire import Wire
from ..mesh import Mesh


@dataclass
class Flight:
    """Differences under way.

    due     the step after which their mean is used
    tokens  that this island has learned them from
    """

    due: int
    tokens: float
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


class Route:
    """The way of one group of shards. All shards have the same dtype and device.

    sent_bytes    that this rank has sent to other islands; wait_seconds: for which its host has waited for flights. Whoever
                  reads them sets them back
    """

    _newest: threading.Thread | None = None  # of all routes of the process: they share a process group

    def __init__(
        self, mesh: Mesh, copies: DeviceMesh, wire: Wire, shapes: Sequence[torch.Size], like: torch.Tensor | None
    ) -> None:
        """copies: ranks of the island that hold the same shards; like: one of the shards, None: there is none here"""
        assert mesh.across is not None
        self._across, self._islands, self._wire, self._shapes = mesh.across, mesh.across.size(), wire, shapes
        self._copies = copies
        self._device = mesh.device if like is None else like.device
        self._dtype = torch.float32 if like is None else like.dtype
        self._numel = sum(map(prod, shapes))
        unit = copies.size() * self._islands * wire.block
        self._part = max(1, -(-self._numel // unit)) * wire.block
        self.sent_bytes, self.wait_seconds = 0, 0.0

    def send(self, differences: Sequence[torch.Tensor], due: int, tokens: float, *, stop: bool) -> Flight:
        """Send differences off. They may be written to afterwards."""
        numbers = torch.zeros(self._copies.size() * self._islands * self._part, dtype=self._dtype, device=self._device)
        if differences:
            torch.cat([each.reshape(-1) for each in differences], out=numbers[: self._numel])
        mine = numbers.view(self._copies.size(), self._islands, self._part)[self._copies.get_local_rank()]
        sent = self._wire.encode(mine).cpu()
        self.sent_bytes += 2 * sent.numel() // self._islands * (self._islands - 1)
        flight = Flight(due, tokens)
        flight.thread = threading.Thread(
            target=self._travel, args=(flight, sent, stop, Route._newest), name="between-islands", daemon=True
        )
        Route._newest = flight.thread
        flight.thread.start()
        return flight

    @torch.no_grad()
    def _travel(self, flight: Flight, sent: torch.Tensor, stop: bool, before: threading.Thread | None) -> None:
        try:
            if before is not None:
                before.join()
            said = torch.tensor([[flight.tokens, float(stop)]], dtype=torch.float64)
            all_said = torch.empty(self._islands, 2, dtype=torch.float64)
            dist.all_gather(list(all_said.split(1)), said, self._across)
            received = torch.empty_like(sent)
            dist.all_to_all_single(received, sent, group=self._across)
            parts = self._wire.decode(received, self._dtype)
            shares = (all_said[:, 0] / all_said[:, 0].sum().clamp(min=1)).tolist()
            mean = torch.zeros(1, self._part, dtype=self._dtype)
            for part, share in zip(parts, shares, strict=True):  # in the order of the islands, on all of them
                mean[0].add_(part, alpha=share)
            back = self._wire.encode(mean)
            everything = torch.empty(self._islands, back.shape[-1], dtype=torch.uint8)
            dist.all_gather(list(everything.split(1)), back, self._across)
            flight.mean, flight.stops = everything, bool(all_said[:, 1].any())
        except BaseException as error:
            flight.error = error

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
