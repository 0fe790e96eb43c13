"""Snapshot: copy live tensors into an arena while training goes on, until the optimizer is about to change them."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..parallel.fragment import Fragment
from .arena import Arena
from .dtypes import in_panels, same_bits
from .errors import CheckpointError
from .faults import reach
from .plan import Copy, FileLayout

# Copied by one call, after which the writer may have it.
BATCH_BYTES = 16 * 2**20


class Snapshot:
    """One copy of a rank's pieces into an arena.

    On a GPU the copies run on a stream of their own, after the work that was queued when the save began; the trainer's
    stream waits for them just before the update, on the device, without holding up the host.
    """

    def __init__(self, fragments: Sequence[Fragment]) -> None:
        self.fragments = fragments
        self.seconds = 0.0
        self._issued = threading.Event()
        self._device = next((f.tensor.device for f in fragments if f.tensor.is_cuda), None)
        self._begun: torch.cuda.Event | None = None
        self._copied: torch.cuda.Event | None = None
        self._waits: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        if self._device is not None:
            self._begun = torch.cuda.Event()
            self._begun.record(torch.cuda.current_stream(self._device))

    def copy(self, arena: Arena, layout: FileLayout, stream: torch.cuda.Stream | None) -> None:
        """Fill the arena and return when it is full; its watermark follows. Called from the save's thread, once."""
        start = time.perf_counter()
        reach("stage.before")
        targets = arena.views(layout)
        copies = layout.copies
        batches = _batches(copies)
        if self._device is None:
            for low, high in batches:
                _copy_on_host(targets[low:high], self._sources(copies[low:high]))
                arena.watermark.set(copies[high - 1].stop)
        else:
            assert stream is not None and self._begun is not None
            events: list[torch.cuda.Event] = []
            with torch.cuda.device(self._device), torch.cuda.stream(stream):
                stream.wait_event(self._begun)
                for low, high in batches:
                    _copy_from_device(targets[low:high], self._sources(copies[low:high]))
                    events.append(torch.cuda.Event())
                    events[-1].record(stream)
            self._copied = events[-1]
            self._issued.set()  # from here on the trainer's stream can wait by itself
            for (_, high), event in zip(batches, events, strict=True):
                event.synchronize()
                arena.watermark.set(copies[high - 1].stop)
        reach("stage.after")
        self.seconds = time.perf_counter() - start
        self.release()

    def _sources(self, copies: Sequence[Copy]) -> list[torch.Tensor]:
        return [_source(self.fragments[copy.source], copy) for copy in copies]

    def release(self) -> None:
        """Let the update go on: the copy is complete, or it will not be made."""
        self.fragments = ()
        self._issued.set()

    def wait(self, timeout: float) -> float:
        """Hold up the update until the copy no longer needs the tensors; returns the seconds that this thread waited."""
        start = time.perf_counter()
        if not self._issued.wait(timeout):
            raise CheckpointError(f"a snapshot did not finish within {timeout:g} s")
        if self._copied is not None and not self._copied.query():
            stream = torch.cuda.current_stream(self._device)
            before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            before.record(stream)
            stream.wait_event(self._copied)
            after.record(stream)
            self._waits.append((before, after))
        return time.perf_counter() - start

    def starves(self) -> bool:
        """Whether time that the host spends now is lost: not while the GPU has work queued."""
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


def _copy_from_device(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    foreach_copy: Any = vars(torch)["_foreach_copy_"]  # one call for many copies: the interpreter is free meanwhile
    with torch.no_grad():
        foreach_copy(targets, sources, non_blocking=True)


def _batches(copies: Sequence[Copy]) -> list[tuple[int, int]]:
    """Runs of copies `[low, high)` that are made by one call, each of about BATCH_BYTES."""
    edges = [0]
    start = 0
    for index, copy in enumerate(copies):
        if copy.stop - start >= BATCH_BYTES or index == len(copies) - 1:
            edges.append(index + 1)
            start = copy.stop
    return list(itertools.pairwise(edges))
