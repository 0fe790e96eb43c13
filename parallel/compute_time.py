"""Time that a rank itself computes in a step, apart from its waiting for other ranks."""

from __future__ import annotations

import torch

from .heartbeat import OWN_WORK, Heartbeat, Phase


class ComputeTime:
    """Measures the own work of a rank's steps: loading data, forward and backward of its share, on a CPU also the update.

    On a GPU two events enclose the passes on the device. The host reads them later, when they have passed, and never waits.
    What a pass waits for other ranks is in it: under ZeRO-3, tensor, context, expert and pipeline parallelism all ranks of a
    group show the time of the slowest.
    """

    def __init__(self, device: torch.device, heartbeat: Heartbeat) -> None:
        self._on_device = device.type == "cuda"
        self._heartbeat = heartbeat
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._begun: torch.cuda.Event | None = None
        self._host = 0.0
        self._newest = 0.0

    def __enter__(self) -> None:
        """Begin the passes of a step."""
        if self._on_device:
            self._begun = torch.cuda.Event(enable_timing=True)
            self._begun.record()

    def __exit__(self, *_error: object) -> None:
        """End them."""
        if self._begun is not None:
            done = torch.cuda.Event(enable_timing=True)
            done.record()
            self._events.append((self._begun, done))
            self._begun = None

    def newest(self) -> float:
        """Return the seconds of the newest step whose work is done; 0.0 before there is one. Call it once a step."""
        phases = (Phase.DATA,) if self._on_device else OWN_WORK
        total = sum(self._heartbeat.totals[phase] for phase in phases)
        host, self._host = total - self._host, total
        if not self._on_device:
            return host
        while self._events and self._events[0][1].query():
            begun, done = self._events.pop(0)
            self._newest = begun.elapsed_time(done) / 1000
        return host + self._newest
