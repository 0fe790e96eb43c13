"""How long steps take, measured where the work is done."""

from __future__ import annotations

import time

import torch


class Moment:
    """When the work queued so far is done: of a GPU an event on its stream, which nobody waits for; elsewhere the time of day.

    The host runs ahead of a GPU by up to a step, and catches up when it evaluates. Between moments of the device there is one
    step's work, whatever the host did meanwhile.
    """

    def __init__(self, device: torch.device) -> None:
        self._event: torch.cuda.Event | None = None
        self._seconds = 0.0
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record()
        else:
            self._seconds = time.perf_counter()

    def since(self, earlier: Moment) -> float:
        """Seconds from an earlier moment of the same device to this one. Waits until the device has got here."""
        if self._event is None or earlier._event is None:
            return self._seconds - earlier._seconds
        self._event.synchronize()
        return earlier._event.elapsed_time(self._event) / 1000
