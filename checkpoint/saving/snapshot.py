"""Snapshot: copy live tensors into a staging buffer while training goes on, until the optimizer is about to change them."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ...parallel.fragment import Fragment
from ..dtypes import in_panels, same_bits
from ..errors import CheckpointError
from ..faults import reach
from ..planning.plan import Copy, FileLayout
from .device import Device, set_aside
from .staging import StagingBuffer

# Copied by one call, after which the writer may have it.
BATCH_BYTES = 16 * 2**20
WAITS_BEFORE = 4  # the vote, the decision, a new plan, memory


class Snapshot:
    """One copy of a rank's pieces into a staging buffer.

    On a GPU the copies run on streams of their own, after the work that was queued when the save began; the trainer's
    stream waits, on the device and just before the update, until they have left the tensors: for the host, or for the
    GPU's spare memory. The host is not held up.
    """

    def __init__(self, fragments: Sequence[Fragment]) -> None:
        self.fragments = fragments
        self.seconds = 0.0
        self.bytes = 0
        self.bytes_per_second = 0.0
        self._issued = threading.Event()
        self._device = next((f.tensor.device for f in fragments if f.tensor.is_cuda), None)
        self._begun: torch.cuda.Event | None = None
        self._left: list[torch.cuda.Event] = []
        self._waits: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        if self._device is not None:
            self._begun = torch.cuda.Event()
            self._begun.record(torch.cuda.current_stream(self._device))

    def copy(self, buffer: StagingBuffer, layout: FileLayout, device: Device | None) -> None:
        """Fill the staging buffer and return when it is full; its watermark follows. Called from the save's thread, once."""
        reach("snapshot.before")
        targets = buffer.views(layout)
        if self._device is None:
            start = time.perf_counter()
            for low, high in _batches(layout.copies):
                _copy_on_host(targets[low:high], self._sources(layout.copies[low:high]))
                buffer.watermark.set(layout.copies[high - 1].stop)
            self.seconds = time.perf_counter() - start
        else:
            assert device is not None and self._begun is not None
            device.make_room()
            try:
                self.seconds = self._copy_from(device, buffer, layout.copies, targets, self._begun)
            except BaseException:
                for stream in device.streams:  # what is queued must not read tensors, or fill memory, that are others' by then
                    stream.synchronize()
                raise
        reach("snapshot.after")
        self.bytes, self.bytes_per_second = layout.bytes, layout.bytes / max(self.seconds, 1e-9)
        self.release()

    def _copy_from(
        self,
        device: Device,
        buffer: StagingBuffer,
        copies: Sequence[Copy],
        targets: list[torch.Tensor],
        begun: torch.cuda.Event,
    ) -> float:
        """The copies of the file's first part go straight to the host, those of the rest through spare memory.

        Returns the seconds from the first to the last of them. They begin when the GPU has done what was queued before the
        save; the host is about a step ahead of it, so that its own clock would count most of that step.
        """
        first, places = set_aside([copy.stop - copy.start for copy in copies], [part.numel() for part in device.spare])
        for event in [begun, *(_mark(stream) for stream in device.streams)]:  # a save that failed may have left copies behind
            for stream in device.streams:
                stream.wait_event(event)
        started = _mark(device.streams[0], timed=True)
        aside = [
            device.spare[room][at : at + copy.stop - copy.start].view(target.dtype).view(target.shape)
            for (room, at), copy, target in zip(places, copies[first:], targets[first:], strict=True)
        ]
        with torch.cuda.stream(device.streams[0]):
            if aside:
                _copy_on_device(aside, self._sources(copies[first:]))
        is_aside = _mark(device.streams[0])
        done = [
            (high, self._queue(device, turn, targets[low:high], self._sources(copies[low:high])))
            for turn, (low, high) in enumerate(_batches(copies[:first]))
        ]
        self._left = [_mark(stream) for stream in device.streams]
        self._issued.set()  # from here on the trainer's stream can wait by itself
        for stream in device.streams[1:]:
            stream.wait_event(is_aside)
        done += [
            (first + high, self._queue(device, turn, targets[first + low : first + high], aside[low:high]))
            for turn, (low, high) in enumerate(_batches(copies[first:]))
        ]
        ended = [_mark(stream, timed=True) for stream in device.streams]
        for high, event in done:
            event.synchronize()
            buffer.watermark.set(copies[high - 1].stop)
        for event in ended:
            event.synchronize()
        return max(started.elapsed_time(event) for event in ended) / 1000

    def _queue(self, device: Device, turn: int, targets: list[torch.Tensor], sources: list[torch.Tensor]) -> torch.cuda.Event:
        stream = device.streams[turn % len(device.streams)]
        with torch.cuda.stream(stream):
            _copy_on_device(targets, sources)
        return _mark(stream)

    def _sources(self, copies: Sequence[Copy]) -> list[torch.Tensor]:
        return [_source(self.fragments[copy.source], copy) for copy in copies]

    def release(self) -> None:
        """Let the update go on: the copy is complete, or it will not be made."""
        self.fragments = ()
        self._issued.set()

    def wait(self, timeout: float) -> float:
        """Hold up the update until the copy no longer needs the tensors; returns the seconds that this thread waited.

        timeout: of each wait before the copy. One that takes longer ends the save, and must not end the run by it.
        """
        start = time.perf_counter()
        if not self._issued.wait(WAITS_BEFORE * timeout):
            waited = f"{WAITS_BEFORE * timeout:g} s ({WAITS_BEFORE} times checkpoint.timeout)"
            raise CheckpointError(f"a snapshot did not leave the tensors within {waited}")
        if not all(event.query() for event in self._left):
            stream = torch.cuda.current_stream(self._device)
            before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            before.record(stream)
            for event in self._left:
                stream.wait_event(event)
            after.record(stream)
            self._waits.append((before, after))
        return time.perf_counter() - start

    @property
    def settled(self) -> bool:
        """Return whether the snapshot is complete and the trainer's stream has got past it."""
        return not self.fragments and all(after.query() for _, after in self._waits)

    def starves(self) -> bool:
        """Return whether the GPU has no work queued, so that time the host spends now is lost."""
        return self._device is None or torch.cuda.current_stream(self._device).query()

    def device_stall(self) -> float:
        """Seconds that the trainer's stream stood still for the copy. Waits for the stream to get past that point."""
        total = 0.0
        for before, after in self._waits:
            after.synchronize()
            total += before.elapsed_time(after) / 1000
        return total


def _source(fragment: Fragment, copy: Copy) -> torch.Tensor:
    """A view of the live values in the order in which the file has them: panel by panel."""
    tensor, box = fragment.tensor.detach(), copy.box
    if box != fragment.box:
        tensor = tensor[box.slices(fragment.box.offsets)]
    return in_panels(tensor, copy.panels)


def _copy_on_host(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    """By NumPy, in this thread alone: PyTorch would spread each copy over the threads that are busy with the next step."""
    for target, source in zip(targets, sources, strict=True):
        np.copyto(same_bits(target).numpy(), same_bits(source).numpy())


def _copy_on_device(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    foreach_copy: Any = vars(torch)["_foreach_copy_"]  # one call for many copies: the interpreter is free meanwhile
    with torch.no_grad():
        foreach_copy(targets, sources, non_blocking=True)


def _mark(stream: torch.cuda.Stream, timed: bool = False) -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=timed)
    event.record(stream)
    return event


def _batches(copies: Sequence[Copy]) -> list[tuple[int, int]]:
    """Runs of copies `[low, high)` that are made by one call, each of about BATCH_BYTES."""
    edges = [0]
    start = copies[0].start if copies else 0
    for index, copy in enumerate(copies):
        if copy.stop - start >= BATCH_BYTES or index == len(copies) - 1:
            edges.append(index + 1)
            start = copy.stop
    return list(itertools.pairwise(edges))
