"""Time that a rank itself computes in a step, apart from its waiting for other ranks."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator
from typing import NamedTuple

import torch

from .heartbeat import OWN_WORK, Heartbeat, Phase

Span = tuple[torch.cuda.Event, torch.cuda.Event]
"""Two events between which time passes."""
PASSES = (Phase.FORWARD, Phase.BACKWARD)


class StepWork(NamedTuple):
    """Seconds of a step in which a rank itself worked, and in which it waited inside its passes for messages of rings.

    What it waited includes what a transfer took beyond the computation that it was to be hidden by.
    """

    own: float
    ring_wait: float


class _Passes(NamedTuple):
    """The passes of a step on the device, and the waiting in them: for gradients, and for messages of rings."""

    span: Span
    waits: list[Span]
    ring_waits: list[Span]


class ComputeTime:
    """Measures the own work of a rank's steps: loading data, forward and backward of its share, on a CPU also the update.

    On a GPU two events enclose the passes on the device. The host reads them later, when they have passed, and never waits.
    Waiting for weights that are gathered and gradients that are summed within the passes is left out (`waiting`). For messages
    of rings it is told apart (`ring_waiting`). What a pass waits for other ranks in another way is in it: under tensor, expert
    and pipeline parallelism, and under DeepSpeed's ZeRO-2 and 3, all ranks of a group show the time of the slowest.
    """

    def __init__(self, device: torch.device, heartbeat: Heartbeat) -> None:
        self._on_device = device.type == "cuda"
        self._heartbeat = heartbeat
        self._events: list[_Passes] = []
        self._read: list[torch.cuda.Event] = []  # events whose times have been read
        self._begun: torch.cuda.Event | None = None
        self._waits: list[Span] = []
        self._ring_waits: list[Span] = []
        self._in_passes = False
        self._host = 0.0
        self._ring_wait = 0.0  # of the host since `newest` was called
        self._newest = StepWork(0.0, 0.0)

    def __enter__(self) -> None:
        """Begin the passes of a step."""
        self._in_passes = True
        if self._on_device:
            self._begun, self._waits, self._ring_waits = self._mark(), [], []

    def __exit__(self, *_error: object) -> None:
        """End them."""
        self._in_passes = False
        if self._begun is not None:
            self._events.append(_Passes((self._begun, self._mark()), self._waits, self._ring_waits))
            self._begun = None

    @contextlib.contextmanager
    def waiting(self) -> Generator[None]:
        """Leave out what is done within a `with` block in the passes of a step: waiting for other ranks. Blocks may be nested.

        Elsewhere, as in an evaluation, nothing is left out. What is usual of a pass is learned with the waiting in it.
        """
        phase = self._heartbeat.phase
        if phase not in PASSES:
            yield
            return
        self._heartbeat.interrupt(Phase.EXCHANGE)
        begun = None if self._begun is None else self._mark()
        try:
            yield
            if begun is not None:  # not after an error, which may be the device's
                self._waits.append((begun, self._mark()))
        finally:
            self._heartbeat.interrupt(phase)

    @contextlib.contextmanager
    def ring_waiting(self) -> Generator[None]:
        """Count what is done within a `with` block in the passes of a step as waiting for a ring's messages.

        A pass has many of these: the heartbeat's phase stays, so that its usual duration is still that of a whole pass.
        """
        if not self._in_passes:
            yield
        elif self._on_device:
            begun = self._mark()
            yield
            self._ring_waits.append((begun, self._mark()))
        else:
            began = time.monotonic()
            try:
                yield
            finally:
                self._ring_wait += time.monotonic() - began

    def newest(self) -> StepWork:
        """Return the work of the newest step that is done; zeros before there is one. Call it once a step."""
        phases = (Phase.DATA,) if self._on_device else OWN_WORK
        total = sum(self._heartbeat.totals[phase] for phase in phases)
        host, self._host = total - self._host, total
        if not self._on_device:
            ring_wait, self._ring_wait = self._ring_wait, 0.0
            return StepWork(host - ring_wait, ring_wait)
        while self._events and self._events[0].span[1].query():
            passes = self._events.pop(0)
            ring_wait = sum(map(_seconds, passes.ring_waits))
            self._newest = StepWork(_seconds(passes.span) - sum(map(_seconds, passes.waits)) - ring_wait, ring_wait)
            for span in (passes.span, *passes.waits, *passes.ring_waits):
                self._read += span
        return StepWork(host + self._newest.own, self._newest.ring_wait)

    def _mark(self) -> torch.cuda.Event:
        """Record an event on the current stream. Each message of a ring in each layer has two, so that they are used again."""
        event = self._read.pop() if self._read else torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _seconds(span: Span) -> float:
    return span[0].elapsed_time(span[1]) / 1000
