"""Time that a rank itself computes in a step, apart from its waiting for other ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Generator

import torch

from .heartbeat import OWN_WORK, Heartbeat, Phase

Span = tuple[torch.cuda.Event, torch.cuda.Event]
"""Two events between which time passes."""
PASSES = (Phase.FORWARD, Phase.BACKWARD)


class ComputeTime:
    """Measures the own work of a rank's steps: loading data, forward and backward of its share, on a CPU also the update.

    On a GPU two events enclose the passes on the device. The host reads them later, when they have passed, and never waits.
    Waiting for weights that are gathered and gradients that are summed within the passes is left out (`waiting`). What a pass
    waits for other ranks in another way is in it: under tensor, context, expert and pipeline parallelism, and under DeepSpeed's
    ZeRO-2 and 3, all ranks of a group show the time of the slowest.
    """

    def __init__(self, device: torch.device, heartbeat: Heartbeat) -> None:
        self._on_device = device.type == "cuda"
        self._heartbeat = heartbeat
        self._events: list[tuple[Span, list[Span]]] = []  # of the passes of a step, and of the waiting in them
        self._begun: torch.cuda.Event | None = None
        self._waits: list[Span] = []
        self._host = 0.0
        self._newest = 0.0

    def __enter__(self) -> None:
        """Begin the passes of a step."""
        if self._on_device:
            self._begun, self._waits = _mark(), []

    def __exit__(self, *_error: object) -> None:
        """End them."""
        if self._begun is not None:
            self._events.append(((self._begun, _mark()), self._waits))
            self._begun = None

    @contextlib.contextmanager
    def waiting(self) -> Generator[None]:
        """Leave out what is done within a `with` block in the passes of a step: waiting for other ranks. Blocks may be nested.

        Elsewhere, as in an evaluation, nothing is left out.
        """
        heartbeat = self._heartbeat
        phase, micro_batch = heartbeat.phase, heartbeat.micro_batch
        if phase not in PASSES:
            yield
            return
        heartbeat.beat(Phase.EXCHANGE, micro_batch)
        begun = None if self._begun is None else _mark()
        yield
        if begun is not None:
            self._waits.append((begun, _mark()))
        heartbeat.beat(phase, micro_batch)

    def newest(self) -> float:
        """Return the seconds of the newest step whose work is done; 0.0 before there is one. Call it once a step."""
        phases = (Phase.DATA,) if self._on_device else OWN_WORK
        total = sum(self._heartbeat.totals[phase] for phase in phases)
        host, self._host = total - self._host, total
        if not self._on_device:
            return host
        while self._events and self._events[0][0][1].query():
            passes, waits = self._events.pop(0)
            self._newest = _seconds(passes) - sum(map(_seconds, waits))
        return host + self._newest


def _mark() -> torch.cuda.Event:
    """Record an event on the current stream."""
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds(span: Span) -> float:
    return span[0].elapsed_time(span[1]) / 1000
