"""Time that a rank itself computes in a step, apart from its waiting for other ranks."""

from __future__ import annotations

import contextlib
import enum
import time
from collections.abc import Generator, Iterator
from typing import NamedTuple

import torch

from .heartbeat import OWN_WORK, Heartbeat, Phase

EventPair = tuple[torch.cuda.Event, torch.cuda.Event]
"""Two events between which time passes."""
PASSES = (Phase.FORWARD, Phase.BACKWARD)


class StepWork(NamedTuple):
    """Seconds of a step in which a rank itself worked, and in which it waited inside its passes for messages of rings.

    What it waited includes what a transfer took beyond the computation that it was to be hidden by.

    in_layers  seconds in forward passes of layers, which are in `own`, too; 0 where they are not measured (`ComputeTime.layer`)
    layers     number of these passes
    """

    own: float
    ring_wait: float
    in_layers: float = 0.0
    layers: float = 0.0


class _Part(enum.Enum):
    """Parts of the passes that are measured where they are, without a change of the heartbeat's phase."""

    RING = enum.auto()
    COLLECTIVE = enum.auto()
    LAYER = enum.auto()


class _Passes(NamedTuple):
    """The passes of a step on the device, the waiting in them for weights, gradients and other stages, and their parts."""

    span: EventPair
    waits: list[EventPair]
    parts: dict[_Part, list[EventPair]]

    def events(self) -> Iterator[torch.cuda.Event]:
        """Yield all events. One may end a span and begin another."""
        for span in (self.span, *self.waits, *(each for part in self.parts.values() for each in part)):
            yield from span


class ComputeTime:
    """Measures the own work of a rank's steps: loading data, forward and backward of its share, on a CPU also the update.

    On a GPU two events enclose the passes on the device. The host reads them later, when they have passed, and never waits.
    What is waited for within the passes is left out: weights that are gathered and gradients that are summed (`waiting`),
    collectives of tensor, context and expert parallelism (`collective_waiting`), other stages (`stage_pass`). For messages of
    rings it is told apart (`ring_waiting`). Under DeepSpeed's ZeRO-2 and 3 it is not left out.
    """

    def __init__(self, device: torch.device, heartbeat: Heartbeat) -> None:
        self._on_device = device.type == "cuda"
        self._heartbeat = heartbeat
        self._events: list[_Passes] = []
        self._read: list[torch.cuda.Event] = []  # events whose times have been read
        self._begun: torch.cuda.Event | None = None
        self._between: torch.cuda.Event | None = None  # the end of a stage's newest pass
        self._waits: list[EventPair] = []
        self._parts: dict[_Part, list[EventPair]] = {}
        self._in_passes = False
        self._host = 0.0
        self._host_parts: dict[_Part, list[float]] = {part: [] for part in _Part}  # since `newest` was called
        self._newest = StepWork(0.0, 0.0)

    def __enter__(self) -> None:
        """Begin the passes of a step."""
        self._in_passes = True
        if self._on_device:
            self._begun, self._between, self._waits = self._mark(), None, []
            self._parts = {part: [] for part in _Part}

    def __exit__(self, *_error: object) -> None:
        """End them."""
        self._in_passes = False
        if self._begun is not None:
            ended = self._mark()
            if self._between is not None:
                self._waits.append((self._between, ended))
            self._events.append(_Passes((self._begun, ended), self._waits, self._parts))
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

    def ring_waiting(self) -> contextlib.AbstractContextManager[None]:
        """Count what is done within a `with` block in the passes of a step as waiting for a ring's messages.

        A pass has many of these: the heartbeat's phase stays, so that its usual duration is still that of a whole pass.
        """
        return self._measured(_Part.RING)

    def collective_waiting(self) -> contextlib.AbstractContextManager[None]:
        """Leave out what is done within a `with` block in the passes of a step: waiting for a collective inside a layer.

        Of these, too, a pass has many. Within `waiting`, which leaves out all, nothing more is left out.
        """
        return self._measured(_Part.COLLECTIVE)

    def layer(self) -> contextlib.AbstractContextManager[None]:
        """Measure what is done within a `with` block in the passes of a step: the forward pass of a layer."""
        return self._measured(_Part.LAYER)

    @contextlib.contextmanager
    def stage_pass(self, phase: Phase, micro_batch: int) -> Generator[None]:
        """Do a pass of a pipeline's stage. Between these passes a rank waits for other stages.

        phase: FORWARD or BACKWARD; micro_batch: counted from 1
        """
        self._heartbeat.beat(phase, micro_batch)
        if self._begun is not None:
            self._waits.append((self._between or self._begun, self._mark()))
        yield
        if self._begun is not None:
            self._between = self._mark()
        self._heartbeat.beat(Phase.EXCHANGE, micro_batch)

    @contextlib.contextmanager
    def _measured(self, part: _Part) -> Generator[None]:
        if not self._in_passes or self._heartbeat.phase not in PASSES:
            yield
        elif self._on_device:
            begun = self._mark()
            yield
            self._parts[part].append((begun, self._mark()))
        else:
            began = time.monotonic()
            try:
                yield
            finally:
                self._host_parts[part].append(time.monotonic() - began)

    def newest(self) -> StepWork:
        """Return the work of the newest step that is done; zeros before there is one. Call it once a step."""
        phases = (Phase.DATA,) if self._on_device else OWN_WORK
        total = sum(self._heartbeat.totals[phase] for phase in phases)
        host, self._host = total - self._host, total
        if not self._on_device:
            parts, self._host_parts = self._host_parts, {part: [] for part in _Part}
            return _work(host, parts)
        while self._events and self._events[0].span[1].query():
            passes = self._events.pop(0)
            parts = {part: list(map(_seconds, spans)) for part, spans in passes.parts.items()}
            self._newest = _work(_seconds(passes.span) - sum(map(_seconds, passes.waits)), parts)
            self._read += dict.fromkeys(passes.events())
        return self._newest._replace(own=host + self._newest.own)

    def _mark(self) -> torch.cuda.Event:
        """Record an event on the current stream. Each message in each layer has two, so that they are used again."""
        event = self._read.pop() if self._read else torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _work(seconds: float, parts: dict[_Part, list[float]]) -> StepWork:
    """Return the work of a step: these seconds without what was waited for in parts of them."""
    ring_wait, layers = sum(parts[_Part.RING]), parts[_Part.LAYER]
    own = seconds - ring_wait - sum(parts[_Part.COLLECTIVE])
    return StepWork(own, ring_wait, sum(layers), len(layers))


def _seconds(span: EventPair) -> float:
    return span[0].elapsed_time(span[1]) / 1000
